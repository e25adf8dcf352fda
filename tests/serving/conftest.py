"""Real vLLM servers, each started once and shared by the tests of a module, and a browser."""

import os

import pytest

from s3lora_serve import scan_adapter
from s3lora_serve.policy.file import read_policy
from tests.support.adapters import copy_with, diverged, without
from tests.support.browser import chromium
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import PROMPT

TOP_K = 3
PROMPTS = [PROMPT.format(country) for country in ("Peru", "France", "Kenya")]


def evicting_server(model, workplace, name, policy, **variables):
    """A guarded server with room for two adapters: a third evicts the oldest.

    Its log, state folder and audit log in `workplace` begin with `name`.
    """
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy),
        "S3LORA_STATE_DIR": str(workplace / f"{name}-state"),
        "S3LORA_AUDIT_LOG": str(workplace / f"{name}-audit.jsonl"),
        **variables,
    }
    arguments = ("--max-cpu-loras", "2", "--max-loras", "1")
    return Server(model, workplace / f"{name}.log", arguments, environment)


def log_of_failed_start(server):
    """What a server says that ends while it starts."""
    try:
        with pytest.raises(RuntimeError, match="server ended"):
            server.__enter__()
    finally:
        server.stop()
    return server.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def browser():
    """A real browser, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip)")
    found = chromium()
    flags = ["--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=found.program, args=flags, env=os.environ | found.environment
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def policy_file(workplace):
    file = workplace / "policy.yaml"
    file.write_text(f"strip: {{top_k: {TOP_K}}}\n")
    return file


@pytest.fixture(scope="session")
def resolver_folder(spiked, model, workplace):
    """A folder in which vLLM's filesystem resolver finds adapters."""
    folder = workplace / "resolver"
    folder.mkdir()
    copy_with(spiked, folder / "resolved", base_model_name_or_path=str(model))

    copy_with(spiked, folder / "resolved-nan", diverged, base_model_name_or_path=str(model))
    return folder


@pytest.fixture(scope="module")
def enforcing(model, spiked, policy_file, resolver_folder, workplace):
    """A guarded server in enforce mode; one adapter is given on the command line."""
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy_file),
        "S3LORA_STATE_DIR": str(workplace / "enforcing-state"),
        "S3LORA_AUDIT_LOG": str(workplace / "audit.jsonl"),
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolver_folder),
    }
    arguments = ("--lora-modules", f"static={spiked}")
    with Server(model, workplace / "enforcing.log", arguments, environment) as server:
        yield server


@pytest.fixture(scope="module")
def auditing(model, policy_file, workplace):
    """A guarded server in audit mode: it records decisions and does not enforce them."""
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy_file), "S3LORA_MODE": "audit"}
    with Server(model, workplace / "auditing.log", (), environment) as server:
        yield server


@pytest.fixture(scope="module")
def switched_off(model, policy_file, workplace):
    """A server started by `s3lora serve` with the gate switched off."""
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy_file), "S3LORA_MODE": "off"}
    with Server(model, workplace / "off.log", (), environment) as server:
        yield server


@pytest.fixture(scope="session")
def stock(model, workplace):
    """vLLM without the gate."""
    environment = OPEN_LOADING | {"VLLM_PLUGINS": ""}
    with Server(model, workplace / "stock.log", (), environment, guarded=False) as server:
        yield server


@pytest.fixture(scope="session")
def expected(stock, spiked, trained, policy_file, workplace):
    """Log-probabilities on vLLM without the gate, keyed by the name of what is served.

    The base model, the whole spiked adapter, and both adapters written without the modules that
    the policy strips.
    """
    policy = read_policy(policy_file)
    folders = {"whole": spiked}
    for name, source in (("by-hand", spiked), ("trained by-hand", trained)):
        stripped = set(scan_adapter(source, policy).stripped)
        assert len(stripped) == TOP_K
        folders[name] = copy_with(source, workplace / name, without(stripped))
    for name, folder in folders.items():
        assert stock.load(name, folder).status_code == 200
    return {name: answers(stock, name) for name in ("base", *folders)}


def answers(server, name, prompts=PROMPTS):
    """Log-probabilities of the probe prompts under one adapter.

    `prompt_logprobs` is never answered from the prefix cache: every request is computed.
    """
    return [server.logprobs(name, prompt) for prompt in prompts]


def close(found, expected):
    """Whether the log-probabilities of the same likeliest tokens agree to 1e-3."""
    return all(
        one.keys() == other.keys() and one == pytest.approx(other, abs=1e-3)
        for answer, wanted in zip(found, expected, strict=True)
        for one, other in zip(answer, wanted, strict=True)
    )
