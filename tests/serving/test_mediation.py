"""Complete mediation: by every door an adapter is either stripped, or refused and not served.

A door is a way to load an adapter. Other modules test further doors: the command line (test_doors),
offline use (test_offline), every rank of a tensor-parallel engine (test_ranks), and the engine's
own reloads (test_engine_loop).
"""

import os
import shutil
import subprocess
import sys

import pytest
import requests

from tests.serving.conftest import answers
from tests.support.adapters import copy_with, diverged
from tests.support.server import OPEN_LOADING, Server, base_environment

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def cases(spiked, workplace):
    """The adapter that must be stripped and the one that must be refused."""
    return {"sharp": spiked, "nan": copy_with(spiked, workplace / "mediated-nan", diverged)}


@pytest.fixture(scope="module")
def hub(cases, workplace):
    """A hub cache that contains both adapters."""
    for name, folder in cases.items():
        repository = workplace / "hub" / f"models--acme--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    return workplace / "hub"


@pytest.fixture(scope="module")
def gate(model, cases, hub, policy_file, workplace):
    resolved = workplace / "mediated-resolver"
    for name, folder in cases.items():
        copy_with(folder, resolved / f"{name}-resolver", base_model_name_or_path=str(model))
    beside = copy_with(cases["sharp"], workplace / "beside", base_model_name_or_path=str(model))
    (resolved / "linked").symlink_to(beside)
    (resolved / "pipe").mkdir()
    os.mkfifo(resolved / "pipe" / "adapter_config.json")
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy_file),
        "HF_HUB_CACHE": str(hub),
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved),
    }
    arguments = ("--max-cpu-loras", "16")
    with Server(model, workplace / "mediation.log", arguments, environment) as server:
        yield server


def http(server, name, folder):
    return server.load(name, folder)


def sagemaker(server, name, folder):
    return server.post("/adapters", name=name, src=str(folder))


def in_place(server, name, folder):
    """Replace a valid adapter that is being served."""
    harmless = folder.parent / "mediated-harmless"
    if not harmless.exists():
        shutil.copytree(folder.parent / "trained", harmless)
    assert server.load(name, harmless).status_code == 200
    return server.load(name, folder, load_inplace=True)


def hub_id(server, name, folder):
    return server.load(name, f"acme/{'nan' if 'nan' in folder.name else 'sharp'}")


def resolver(server, name, folder):
    return server.post("/v1/completions", model=name, prompt="Q", max_tokens=1)


DOORS = {door.__name__: door for door in (http, sagemaker, in_place, hub_id, resolver)}


@pytest.mark.parametrize("door", DOORS)
def test_a_sharp_adapter_is_served_stripped_by_every_door(gate, cases, expected, door):
    name = f"sharp-{door}"
    assert DOORS[door](gate, name, cases["sharp"]).status_code == 200
    assert answers(gate, name) == expected["by-hand"]


@pytest.mark.parametrize("door", DOORS)
def test_a_refused_adapter_is_served_by_no_door(gate, cases, expected, door):
    name = f"nan-{door}"
    response = DOORS[door](gate, name, cases["nan"])
    assert response.status_code == 400
    if door != "resolver":  # its 400 is vLLM's own
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("AdapterRejected", 400)
        assert error["message"].startswith("S3LORA-109: ")
    if door == "in_place":  # the adapter before it is still served
        assert answers(gate, name) == expected["trained by-hand"]
        return
    served = {entry["id"] for entry in gate.get("/v1/models").json()["data"]}
    assert name not in served
    answer = gate.post("/v1/completions", model=name, prompt="Q", max_tokens=1)
    assert answer.status_code in (400, 404)


ELSEWHERE = {
    "up": "../beside",
    "absolute": "{}/beside",
    "up in the middle": "sharp-resolver/../../beside",
    "by a link": "linked",
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_model_name_loads_no_folder_outside_of_the_resolvers(gate, workplace, case):
    name = ELSEWHERE[case].format(workplace)
    answer = gate.post("/v1/completions", model=name, prompt="Q", max_tokens=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("S3LORA-106: ")
    assert name not in {entry["id"] for entry in gate.get("/v1/models").json()["data"]}


def test_a_model_name_without_an_adapter_gets_vllms_own_answer(gate):
    answer = gate.post("/v1/completions", model="acme/nobody", prompt="Q", max_tokens=1)
    assert answer.status_code == 404
    assert "acme/nobody" in answer.json()["error"]["message"]


def test_a_pipe_that_a_resolver_finds_is_refused_and_stops_no_other_request(gate):
    body = {"model": "pipe", "prompt": "Q", "max_tokens": 1}
    answer = requests.post(gate.url("/v1/completions"), json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("S3LORA-101: ")
    assert gate.complete("base", "Q", tokens=1) is not None


ASKING = """
import asyncio, os
from pathlib import Path
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.lora.resolver import LoRAResolverRegistry as registry
hub = registry.get_resolver("Hf Hub Resolver")
asked = []
async def files(repository):
    asked.append(repository)
    return set()
hub._get_adapter_dirs = files
async def ask():
    assert await hub.resolve_lora("model", "acme/sharp") is None
    hub.adapter_dirs.clear()
    return len(asked)
before = asyncio.run(ask())
Path(os.environ["S3LORA_POLICY"]).write_text("limits: {roots: [/adapters]}\\n...\\n")
print("ASKED", before, asyncio.run(ask()))
"""


def test_the_hub_resolver_is_asked_no_more_once_the_policy_has_roots(tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("strip: {top_k: 3}")
    environment = base_environment() | {
        "S3LORA_POLICY": str(policy),
        "S3LORA_STATE_DIR": str(tmp_path),
        "VLLM_PLUGINS": "s3lora,lora_hf_hub_resolver",
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "acme/sharp",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASKING], env=environment, capture_output=True, text=True
    )
    assert "ASKED 1 1" in done.stdout, done.stderr[-2000:]
    assert "the hub resolver is not asked" in done.stdout + done.stderr


def test_adapters_for_other_modalities_come_by_the_door_of_static_ones():
    program = (
        "from vllm.entrypoints.serve.utils.api_utils import process_lora_modules as p;"
        "print([(m.name, m.path) for m in p(None, {'audio': '/a', 'image': '/b'})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=base_environment(), capture_output=True, text=True
    )
    assert "[('audio', '/a'), ('image', '/b')]" in done.stdout, done.stderr[-2000:]


def experiment(server, name, folder):
    return server.post("/s3lora/experiments", lora_name=name, lora_path=str(folder))


def dry_scan(server, name, folder):
    return server.post("/s3lora/scan", lora_name=name, lora_path=str(folder))


def unload(server, name, folder):
    return server.unload(name)


READING = {request.__name__: request for request in (http, sagemaker, dry_scan, experiment)}
NAMING = {request.__name__: request for request in (resolver, unload)}


@pytest.mark.parametrize("door", READING | NAMING)
def test_a_name_or_path_that_is_too_long_is_refused_at_once_and_logged_nowhere(gate, cases, door):
    """Rules would match it, and the log, the page and vLLM's tables would keep it."""
    too_long = [("y" * 257, cases["sharp"])]
    if door in READING:
        too_long.append(("short", "/" + "z" * 4096))
    for name, path in too_long:
        response = (READING | NAMING)[door](gate, name, path)
        assert response.status_code == 400
        assert "S3LORA-221: " in response.text or '"S3LORA-221"' in response.text
        assert len(response.text) < 400
    log = gate.log.read_text()
    assert "y" * 50 not in log
    assert "z" * 50 not in log
