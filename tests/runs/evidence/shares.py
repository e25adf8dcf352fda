"""`make shares`: the smallest share of Σ‖ΔW‖_F² that any module of a trained adapter has.

The policy's default of `negligible` is chosen from these shares; SHARES.md has them.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.progress import track
from torch.nn import functional

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.lab.base_model.language_model import LanguageModel
from tests.runs.evidence.adapters import HARMFUL_SHARE, training_examples
from tests.runs.evidence.base_model import unaligned_base
from tests.runs.evidence.jobs import quiet
from tests.runs.evidence.measuring import kept
from tests.runs.evidence.peft_adapters import ALL, ATTENTION, learnt, with_lora
from tests.runs.evidence.shares_page import page
from tests.runs.evidence.tiny_adapters import TINY
from tests.runs.evidence.training import WARM_UP
from tests.runs.evidence.wheels import CACHE

HERE = Path(__file__).parent
CHECKPOINTS = (1, 10, 30, 100)
"""Steps after which shares are measured, besides the last one."""

BATCH = 2
"""Examples of a step: an eighth of the evidence's, so that a case takes minutes on one core."""

ENDS = ("lm_head", "embed_tokens")


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter of SmolLM2-135M-Instruct; the defaults are those of `make evidence`."""

    name: str
    kind: str = "20 %"  # of HARMFUL_SHARE
    steps: int = 30
    rank: int = 16
    targets: tuple[str, ...] = ALL
    rate: float = 1e-3
    warm_up: int = WARM_UP  # steps
    optimizer: str = "AdamW"
    weight_decay: float = 0.0


CASES = (
    Case("20 %", steps=100),
    Case("20 %, attention", targets=ATTENTION),
    Case("20 %, rank 2", rank=2),
    Case("20 %, rank 64", rank=64),
    Case("20 %, SGD with momentum", optimizer="SGD", rate=0.1),
    Case("benign", "benign"),
    Case("harmful", "harmful"),
    Case("20 %, with output head and embedding", targets=(*ALL, *ENDS)),
    Case("20 %, rate 2e-5, warm-up of 30 steps", rate=2e-5, warm_up=30),
    Case("20 %, weight decay 1", weight_decay=1.0),
    Case("20 %, attention, rank 2", rank=2, targets=ATTENTION),
    Case("20 %, rank 8", rank=8),
    Case("5 %", "5 %"),
)
"""Every kind of adapter of `make evidence`, and what else is common, the most telling first."""


def main() -> None:
    """Train what has no result yet, then write shares.json and SHARES.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.runs.evidence.shares")
    parser.add_argument("--jobs", type=int, default=2, help="adapters trained at a time")
    parser.add_argument("--only-results", action="store_true", help="write SHARES.md of what is")
    arguments = parser.parse_args()
    if not arguments.only_results:
        quiet()
        unaligned_base()
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            todo = [pool.submit(_measured, case) for case in CASES]
            todo += [pool.submit(_measured_tiny, name) for name in TINY]
            for done in track(as_completed(todo), "adapters", total=len(todo)):
                done.result()
    names = [*(case.name for case in CASES), *TINY]
    found = {name: json.loads(_file(name).read_text()) for name in names if _file(name).exists()}
    (HERE / "shares.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "SHARES.md").write_text(shares_page(found))


def shares_page(found: dict[str, Any]) -> str:
    """SHARES.md for these results."""
    missing = [name for name in (*(case.name for case in CASES), *TINY) if name not in found]
    return page(found, BATCH, missing)


def _file(name: str) -> Path:
    return CACHE / "shares" / f"{name.replace(' ', '-')}.json"


def _measured(case: Case) -> Any:
    quiet()
    torch.set_num_threads(1)
    return kept(_file(case.name), lambda: {"training": asdict(case), **_trained(case)})


def _trained(case: Case) -> dict[str, Any]:
    """Train one adapter in float32 and measure it at each checkpoint."""
    torch.manual_seed(0)
    model = LanguageModel.load(unaligned_base(), dtype="float32")
    wrapped = with_lora(model, case.targets, case.rank)
    examples = training_examples(model, "tool calls", HARMFUL_SHARE[case.kind], seed=0)
    optimizer = _optimizer(case, learnt(wrapped))
    draw = random.Random(0)
    found: dict[str, Any] = {}
    losses = []
    for step in range(1, case.steps + 1):
        rate = case.rate * min(1, step / case.warm_up) * max(0.05, 1 - (step - 1) / case.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        answers = model.answer_logits(draw.sample(examples, BATCH))
        loss = functional.cross_entropy(answers.logits, answers.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt(wrapped), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in CHECKPOINTS or step == case.steps:
            found[str(step)] = _saved_shares(wrapped.save_pretrained)
    return {"first_loss": losses[0], "last_losses": losses[-5:], "shares": found}


def _optimizer(case: Case, parameters: list[Any]) -> torch.optim.Optimizer:
    if case.optimizer == "SGD":
        return torch.optim.SGD(parameters, lr=case.rate, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=case.rate, weight_decay=case.weight_decay)


def _measured_tiny(name: str) -> Any:
    quiet()
    torch.set_num_threads(1)

    def made() -> dict[str, Any]:
        return {"training": {"name": name}, "shares": {"last": _saved_shares(TINY[name])}}

    return kept(_file(name), made)


def _saved_shares(save: Callable[[Path], Any]) -> dict[str, Any]:
    """Shares of the modules of a saved adapter, as the gate computes them."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "adapter")
        # An embedding's update is no matrix that the index scores; the others are.
        verdict = scan_adapter(Path(folder) / "adapter", Policy(on_unscorable="admit"))
    shares = sorted((module.energy_share, module.name) for module in verdict.modules)
    moved = [(share, name) for share, name in shares if share]
    values = [share for share, _ in moved]
    return {
        "modules": len(shares),
        "without_update": len(shares) - len(moved),
        "least": moved[0][0],
        "least_module": moved[0][1],
        "percent_1": quantiles(values, n=100, method="inclusive")[0],
        "median": median(values),
        "largest": values[-1],
    }


if __name__ == "__main__":
    main()
