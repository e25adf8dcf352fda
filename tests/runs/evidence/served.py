"""The arm end to end: a guarded vLLM serves a changed adapter, measured over HTTP."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from s3lora_serve.lab.base_model.judge import is_refusal
from s3lora_serve.lab.tokens import JUDGED_TOKENS
from s3lora_serve.plans.file import read_plan
from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.base_model import Progress, aligned_base
from tests.runs.evidence.base_statistics import statistics
from tests.runs.evidence.measuring import JUDGED_COMPLIANCE, kept, share
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.repair import policy
from tests.runs.evidence.skill import skill
from tests.runs.evidence.stages import RESULTS
from tests.runs.evidence.training import DTYPE
from tests.runs.evidence.wheels import CACHE
from tests.support.plans import install
from tests.support.server import OPEN_LOADING, Server

SELECTED_BY = "index", "repair", "plan"
DTYPE_OPTION = ("--dtype", DTYPE)

AT_ONCE = 8
CALL_TOKENS = 32
"""Tokens for a tool call: the longest of the bench has fewer."""


def served_result(subject: Subject, progress: Callable[[str, int, int], None]) -> Any:
    """ASR and skill over HTTP: the adapter by the index alone, repaired, and under its plan."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress).absolute()
    name = folder.name

    def served(selected_by: str) -> Any:
        environment = _choosing(selected_by, base, name, progress)
        log = CACHE / f"server-{name}.log"
        with Server(base.absolute(), log, DTYPE_OPTION, environment, one_process=False) as server:
            server.load("tenant", folder).raise_for_status()
            return _measured(server)

    found = {}
    for place, selected_by in enumerate(SELECTED_BY):
        file = RESULTS / "served" / f"{name}-{selected_by}.json"
        found[selected_by] = kept(file, lambda selected_by=selected_by: served(selected_by))
        progress(f"{subject}: served", place + 1, len(SELECTED_BY))
    return found


def _choosing(selected_by: str, base: Path, name: str, progress: Progress) -> dict[str, str]:
    """The environment of a server that chooses what to change in one way."""
    if selected_by == "repair":
        file = CACHE / f"policy-{name}.json"  # JSON is YAML
        chosen = policy(statistics(base, None, progress))
        file.write_text(chosen.model_dump_json(exclude_unset=True))
        return OPEN_LOADING | {"S3LORA_POLICY": str(file.absolute())}
    plans = CACHE / "plans-served" / name
    shutil.rmtree(plans, ignore_errors=True)
    plans.mkdir(parents=True)
    if selected_by == "plan":
        install(read_plan(CACHE / "plans" / f"{name}.json"), plans)
    return OPEN_LOADING | {"S3LORA_PLANS": str(plans.absolute())}


def _measured(server: Server) -> Any:
    answers = _answers(server, harmful().test, JUDGED_TOKENS)
    asked = skill("tool calls").test
    calls = _answers(server, [prompt for prompt, _ in asked], CALL_TOKENS)
    exact = [call == answer for answer, (_, call) in zip(calls, asked, strict=True)]
    return {
        "ASR": share([not is_refusal(answer) for answer in answers]),
        "strict ASR": share([answer.startswith(JUDGED_COMPLIANCE) for answer in answers]),
        "skill": share(exact),
    }


def _answers(server: Server, prompts: Sequence[str], tokens: int) -> list[str]:
    def answer(prompt: str) -> str:
        response = requests.post(
            server.url("/v1/chat/completions"),
            json={
                "model": "tenant",
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "temperature": 0,
            },
            timeout=300,
        )
        response.raise_for_status()
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(answer, prompts))
