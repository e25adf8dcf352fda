"""`python -m tests.runs.benchmarks.toggled MODEL ADAPTER ROUNDS PAIRS`: skipping, on and off.

Two identical processes differ by more than the effect measured here; one engine that alternates
does not. Seconds are printed as JSON.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from tests.support.programs import print_result
from tests.support.random_batches import switch

PROMPT_TOKENS, NEW_TOKENS = 64, 16
BATCHES = (1, 8)
PROMPTS_ALONE = 3
"""Prompts of batch 1, sent one after another: a single one takes less time than the noise."""

PHASES = "prefill", "decode"
Ask = Callable[[str, str, int], tuple[float, float]]
"""Route, adapter and batch, to seconds of each phase."""

Timed = Callable[[], tuple[float, float]]
SERVED = ("base", "whole", "ten", "half", "all")
ROUTES = {"computed": False, "skipped": True}
PAIRS = {
    "all stripped over base": (("skipped", "all"), ("skipped", "base")),
    "whole, skipped over computed": (("skipped", "whole"), ("computed", "whole")),
}
"""Pairs that should take equal time, and are therefore measured many times."""


def main() -> None:
    """Start the engine under the gate and measure all routes in turns."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    model, adapter, rounds, pairs = sys.argv[1:]
    llm = LLM(
        model, dtype="float32", enforce_eager=True, load_format="dummy", max_model_len=256,
        enable_lora=True, max_lora_rank=16, max_loras=len(SERVED) - 1, max_num_seqs=max(BATCHES),
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    adapters = {name: LoRARequest(name, i, adapter) for i, name in enumerate(SERVED[1:], 1)}
    assert all(llm.collective_rpc(switch, args=(True,))), "skipping is not active"

    def ask(route: str, served: str, batch: int) -> tuple[float, float]:
        llm.collective_rpc(switch, args=(ROUTES[route],))
        return phase_seconds(partial(_timed, llm, adapters.get(served)), batch)

    print_result([in_rounds(ask, int(rounds)), in_pairs(ask, int(pairs))])


def in_rounds(ask: Ask, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round by phase and batch, then by route and adapter."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds + 1):
        routes = list(ROUTES)[:: -1 if turn % 2 else 1]
        for batch, served, route in product(BATCHES, SERVED, routes):
            for phase, seconds in zip(PHASES, ask(route, served, batch), strict=True):
                if turn:  # the first one warms up
                    row = found.setdefault(f"{phase}, {batch}", {})
                    row.setdefault(f"{route}, {served}", []).append(seconds)
    return found


def in_pairs(ask: Ask, number: int) -> dict[str, dict[str, list[float]]]:
    """Ratios by phase and batch, then by pair."""
    found: dict[str, dict[str, list[float]]] = {}
    for _, batch, (name, (one, two)) in product(range(number), BATCHES, PAIRS.items()):
        both = ratios(partial(ask, *one, batch), partial(ask, *two, batch))
        for phase, ratio in zip(PHASES, both, strict=True):
            found.setdefault(f"{phase}, {batch}", {}).setdefault(name, []).append(ratio)
    return found


def ratios(one: Timed, two: Timed) -> list[float]:
    """The ratio of seconds of one to two, for each phase, in the order one, two, two, one.

    Both are warmed up before. In this order, neither position nor a machine that slows down
    changes the ratio.
    """
    _, _, *times = (each() for each in (one, two, one, two, two, one))
    return [
        (first + fourth) / (second + third)
        for first, second, third, fourth in zip(*times, strict=True)
    ]


def phase_seconds(
    timed: Callable[[list[list[int]], int], float], batch: int
) -> tuple[float, float]:
    """Seconds of a batch of prompts, and of a batch of answers to short prompts.

    `timed` takes prompts and the number of tokens of each answer, and returns the seconds.
    """
    long = [[(7 * i + j) % 90 + 5 for i in range(PROMPT_TOKENS)] for j in range(batch)]
    times = PROMPTS_ALONE if batch == 1 else 1
    prefill = sum(timed(long, 1) for _ in range(times)) / times
    return prefill, timed([prompt[:2] for prompt in long], NEW_TOKENS)


def _timed(llm: Any, adapter: Any, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    llm.generate(given, params, lora_request=adapter, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
