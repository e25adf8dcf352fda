"""Adapters in remote storage that fsspec opens: S3 over HTTP, and memory."""

import json
import os
import subprocess
import sys

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.adapter import remote_storage
from s3lora_serve.adapter.remote_storage import RemoteFolder
from s3lora_serve.cli import app
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from tests.support.adapters import CONFIG, WEIGHTS, copy_with, diverged

TWO = Policy(strip=Strip(top_k=2))


@pytest.fixture(scope="module")
def s3():
    """An S3 server, configured for fsspec by environment variables as an operator does."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    boto3.client("s3").create_bucket(Bucket="hub")
    yield boto3.client("s3")
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3, trained, spiked, tmp_path_factory):
    """Four adapters of two tenants in the bucket `hub`; one has diverged, one is a pickle."""
    nan = copy_with(trained, tmp_path_factory.mktemp("nan") / "nan", diverged)
    for name, folder in (("acme/a", trained), ("acme/b", spiked), ("globex/nan", nan)):
        for file in (WEIGHTS, CONFIG):
            s3.upload_file(str(folder / file), "hub", f"{name}/{file}")
    s3.put_object(Bucket="hub", Key="globex/old/adapter_model.bin", Body=b"pickle")
    s3.upload_file(str(trained / CONFIG), "hub", f"globex/old/{CONFIG}")
    return "s3://hub"


def run(*arguments, **more):
    return CliRunner().invoke(app, ["scan", *map(str, arguments)], **more)


def comparable(verdict):
    return {k: v for k, v in verdict.items() if k not in ("path", "name", "seconds")}


def test_a_bucket_is_swept_and_each_verdict_is_that_of_the_local_copy(bucket, trained, spiked):
    done = run(bucket, "--format", "jsonl")
    assert done.exit_code == 1
    verdicts = {v["path"]: v for v in map(json.loads, done.stdout.splitlines())}
    assert list(verdicts) == [
        f"{bucket}/{name}" for name in ("acme/a", "acme/b", "globex/nan", "globex/old")
    ]
    for name, folder in (("acme/a", trained), ("acme/b", spiked)):
        assert verdicts[f"{bucket}/{name}"]["name"] == name[-1]
        assert comparable(verdicts[f"{bucket}/{name}"]) == comparable(
            scan_adapter(folder).as_json()
        )
    reasons = [v["reason"] and v["reason"]["code"] for v in verdicts.values()]
    assert reasons == [None, None, "S3LORA-109", "S3LORA-102"]


def test_patterns_prefixes_and_files_lead_to_adapters_there_too(bucket):
    for given, names in (
        (f"{bucket}/*/[ab]", ["a", "b"]),
        (f"{bucket}/acme/", ["a", "b"]),
        (f"{bucket}/acme/b/{WEIGHTS}", ["b"]),
    ):
        lines = run(given, "--format", "jsonl").stdout.splitlines()
        assert [json.loads(line)["name"] for line in lines] == names


def test_processes_of_their_own_open_the_storage_themselves(bucket):
    command = [sys.executable, "-m", "s3lora_serve", "scan", bucket, "--jobs", "2"]
    done = subprocess.run([*command, "--format", "sarif"], capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    [log] = json.loads(done.stdout)["runs"]
    places = [r["locations"][0]["physicalLocation"]["artifactLocation"] for r in log["results"]]
    assert {"uri": f"s3://hub/globex/nan/{WEIGHTS}"} in places


@pytest.mark.parametrize("url", ["s3://hub/none", "s3://nobody/x", "nosuch://x/y", "s3://hub/z*"])
def test_what_cannot_be_listed_ends_the_command_with_a_reason(bucket, url):
    done = run(url)
    assert done.exit_code == 2
    assert "S3LORA-904" in done.stderr
    assert url in done.stderr


@pytest.fixture
def memory(trained):
    """One adapter in fsspec's memory file system, whose objects a test can change."""
    fs = fsspec.filesystem("memory")
    for file in (WEIGHTS, CONFIG):
        fs.pipe(f"/hub/one/{file}", (trained / file).read_bytes())
    yield fs
    fs.rm("/hub", recursive=True)


def code(policy=TWO):
    verdict = scan_adapter(RemoteFolder("memory://hub/one"), policy)
    return verdict.reason and verdict.reason.code


def test_nothing_larger_than_the_limit_is_asked_for(memory, monkeypatch):
    size = memory.size(f"/hub/one/{WEIGHTS}")
    assert code(Policy(limits=Limits(max_bytes=size))) is None
    opened = []
    real = type(memory).open
    monkeypatch.setattr(type(memory), "open", lambda *a, **k: opened.append(a[1]) or real(*a, **k))
    assert code(Policy(limits=Limits(max_bytes=size - 1))) == "S3LORA-201"
    assert opened == [f"/hub/one/{CONFIG}"]


def test_an_object_that_is_replaced_while_it_is_read_is_refused(memory, monkeypatch):
    monkeypatch.setattr(remote_storage, "BLOCK_BYTES", 2**12)
    real = type(memory).info

    def info(self, path, **options):
        details = real(self, path, **options)
        if path.endswith(WEIGHTS):
            memory.pipe(f"/hub/one/{WEIGHTS}", memory.cat(f"/hub/one/{WEIGHTS}")[::-1])
        return details

    monkeypatch.setattr(type(memory), "info", info)
    assert code() == "S3LORA-105"


def test_a_download_has_a_deadline(memory):
    assert code(Policy(limits=Limits(download_seconds=1e-9))) == "S3LORA-402"


def test_roots_are_folders_and_no_storage_lies_under_them(memory, tmp_path):
    assert code(Policy(limits=Limits(roots=(tmp_path,)))) == "S3LORA-106"


def test_what_the_storage_does_not_hold_is_no_adapter(memory):
    memory.rm(f"/hub/one/{CONFIG}")
    assert code() == "S3LORA-101"


def test_rules_match_urls(memory, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "strip: {top_k: 0}\nrules: [{match: {path: 'memory://**/one'}, strip: {top_k: 1}}]\n"
    )
    lines = run("memory://hub", "--policy", policy, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["decision"] for line in lines] == ["stripped"]
