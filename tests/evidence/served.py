"""The arm end to end: a guarded vLLM serves an adapter with its plan, measured over HTTP."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from s3lora_serve.calibration.judge import JUDGED_TOKENS, is_refusal
from s3lora_serve.plans.file import read_plan
from tests.evidence.adapters import Subject, make_adapter
from tests.evidence.base_model import aligned_base
from tests.evidence.measuring import JUDGED_COMPLIANCE, kept, share
from tests.evidence.prompts import harmful
from tests.evidence.skill import skill
from tests.evidence.stages import RESULTS
from tests.evidence.wheels import CACHE
from tests.support.plans import install
from tests.support.server import OPEN_LOADING, Server

AT_ONCE = 8
CALL_TOKENS = 32
"""Tokens for a tool call: the longest of the bench has fewer."""


def served_result(subject: Subject, progress: Callable[[str, int, int], None]) -> Any:
    """ASR and skill over HTTP: the adapter by the index alone, and under its plan."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress).absolute()

    def made() -> Any:
        plans = CACHE / "plans-served" / folder.name
        shutil.rmtree(plans, ignore_errors=True)
        plans.mkdir(parents=True)
        found = {}
        for place, with_plan in enumerate((False, True)):
            if with_plan:
                install(read_plan(CACHE / "plans" / f"{folder.name}.json"), plans)
            log = CACHE / f"server-{folder.name}.log"
            environment = OPEN_LOADING | {"S3LORA_PLANS": str(plans.absolute())}
            arguments = ("--dtype", "bfloat16")
            with Server(base.absolute(), log, arguments, environment, one_process=False) as server:
                server.load("tenant", folder).raise_for_status()
                found["plan" if with_plan else "index"] = _measured(server)
            progress(f"{subject}: served", place + 1, 2)
        return found

    return kept(RESULTS / f"served-{folder.name}.json", made)


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
