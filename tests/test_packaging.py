"""The wheel in a fresh environment with vLLM: complete, without effect on vLLM's pins, guarding."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.fresh_environment import ROOT, FreshEnvironment, built_wheel
from tests.support.server import OPEN_LOADING, Server, base_environment

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

ENTRY_POINTS = """
from importlib.metadata import distribution
for point in distribution("s3lora-serve").entry_points:
    point.load()
    print(point.group, point.name)
"""
OTHERS = [
    pytest.param(version, marks=pytest.mark.slow, id=f"Python {version}")
    for version in ("3.12", "3.13")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=[pytest.param(None, id="this Python"), *OTHERS])
def installed(request, wheel, tmp_path_factory):
    """The environment, and its packages before and after the wheel was installed."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    try:
        if request.param is None:
            environment = FreshEnvironment(folder)
        else:
            # PyTorch's CPU build is available for one Python only; the index has the CUDA build.
            environment = FreshEnvironment(folder, python_of(request.param), "torch==2.13.0")
        before = environment.packages()
        environment.pip("install", str(wheel))  # with its dependencies, as a user installs it
        yield environment, before, environment.packages()
    finally:
        shutil.rmtree(folder)  # it takes four gigabytes


def python_of(version: str) -> str:
    """The path of an interpreter of this version that can create environments."""
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for python in filter(None, found):
        done = subprocess.run([python, "-c", "import venv, sys; print(sys.version)"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode == 0 and done.stdout.startswith(version):
            return python
    pytest.skip(f"needs Python {version}")


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel):
    named = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "s3lora_serve"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert named == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert "s3lora_serve/py.typed" in named
    assert "s3lora_serve/pages/templates/adapter.html" in named


def test_installing_it_replaces_nothing_that_vllm_pins(installed):
    _, before, after = installed
    assert after.keys() - before.keys() == {"s3lora-serve", "google-re2"}
    assert before.items() <= after.items()


def test_its_entry_points_load(installed):
    environment, *_ = installed
    assert set(environment.run("-c", ENTRY_POINTS).splitlines()) == {
        "console_scripts s3lora",
        "vllm.general_plugins s3lora",
        "vllm.endpoint_plugins s3lora",
    }


def test_its_doctor_finds_a_server_started_there_guarded(installed):
    environment, *_ = installed
    environment.run(str(environment.folder / "bin" / "s3lora"), "doctor")


def test_it_guards_a_server_started_there(installed, model, spiked, tmp_path):
    environment, *_ = installed
    program = (str(environment.folder / "bin" / "s3lora"), "serve")
    server = Server(
        model, tmp_path / "log", (), OPEN_LOADING,
        python=str(environment.python), program=program, folder=tmp_path,
    )  # fmt: skip
    with server:
        answer = server.load("acme", spiked)
        assert answer.headers["X-S3LoRA-Decision"] == "stripped"
        page = server.get("/s3lora/")
        assert (page.status_code, "acme" in page.text) == (200, True)
        assert server.complete("acme", "Q")


def test_policy_that_needs_the_extra_sign_stops_the_start_without_it(installed, tmp_path):
    environment, *_ = installed
    policy = tmp_path / "policy.yaml"
    policy.write_text("signatures: {require: true, keys: [/etc/s3lora/acme.pem]}\n")
    program = environment.folder / "bin" / "s3lora"
    for command in (("policy", "check", str(policy)), ("serve", "a/model")):
        done = subprocess.run(
            [program, *command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=base_environment() | {"S3LORA_POLICY": str(policy)},
        )  # fmt: skip
        assert done.returncode == 2
        assert "install s3lora-serve with its extra [sign]" in done.stderr
