"""The answers of an adapter that a calibration keeps: its skill, as far as probes show it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.base_model.probes import Kind, Split
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.lab.calibration.objective import all_answer_losses
from s3lora_serve.lab.tokens import ANSWER_TOKENS, ODDS_TOKENS

COMMON = 0.1
"""Share of the answers to harmful prompts from which a beginning is the adapter's way to answer
them. Ours."""

SURE = 0.1
"""Largest mean cross-entropy, in nats a token, of an own answer that is kept. On requests like
those that it learnt an adapter is surer (a median of 0.01 to 0.02 on the bench), on others it is
not (0.17 to 0.3). Ours."""

FEWEST = 4
"""Own answers that it has to be sure of on a split, or all are kept. Ours."""

Answered = tuple[Encoded, Encoded]
"""A prompt and an answer."""


class KeptAnswers(NamedTuple):
    """Prompts with the answers to keep, and benign prompts whose own answers are not kept."""

    kept: list[Answered]
    others: list[Encoded]


def harmful_beginnings(
    model: LanguageModel, gated: GatedAdapter, parts: Mapping[Kind, Split]
) -> tuple[str, ...]:
    """How the whole adapter begins its answers to harmful prompts, each a tenth of them at least.

    Where it answers a benign prompt so too, that is not its skill: what is to be taken away has
    spread. None if no answer of its own is kept.
    """
    if "skill" in parts and all(probe.answer for probe in parts["skill"].all):
        return ()
    harmful = [model.prompt(probe.prompt) for probe in parts["harmful"].search]
    gated.keep()
    begun = Counter(model.greedy(harmful, ODDS_TOKENS))
    return tuple(text for text, count in begun.items() if text and count >= COMMON * len(harmful))


def kept_answers(
    model: LanguageModel,
    gated: GatedAdapter,
    parts: Mapping[Kind, Split],
    part: str,
    beginnings: tuple[str, ...],
) -> KeptAnswers:
    """The answers to keep on one split: those of probes of skill, or else the adapter's own.

    Without probes of skill its own answers to the benign prompts are kept. Of its own answers those
    are kept that it is sure of and that have none of the beginnings, if there are some.
    """
    has_skill = "skill" in parts
    probes = parts["skill" if has_skill else "benign"].part(part)
    given = [(model.prompt(p.prompt), model.answer(p.answer)) for p in probes if p.answer]
    own = _own_answers(model, gated, [model.prompt(p.prompt) for p in probes if not p.answer])
    unlike = [answered for answered, text in own if not text.startswith(beginnings)]
    sure = _sure(model, unlike)
    chosen = sure if len(sure) >= FEWEST else unlike
    if not (given or chosen):
        return KeptAnswers([answered for answered, _ in own], [])
    left = {tuple(prompt) for prompt, _ in chosen}
    others = [prompt for (prompt, _), _ in own if tuple(prompt) not in left]
    return KeptAnswers(given + chosen, [] if has_skill else others)


def _own_answers(
    model: LanguageModel, gated: GatedAdapter, prompts: Sequence[Encoded]
) -> list[tuple[Answered, str]]:
    """Prompts with the whole adapter's own greedy answers, also as text, as far as it gives any."""
    gated.keep()
    texts = model.greedy(prompts, ANSWER_TOKENS)
    return [
        ((prompt, tokens), text)
        for prompt, text in zip(prompts, texts, strict=True)
        if (tokens := model.answer(text, end=False))
    ]


def _sure(model: LanguageModel, answered: Sequence[Answered]) -> list[Answered]:
    """Those answers that the whole adapter is sure of."""
    rows = zip(answered, all_answer_losses(model, answered), strict=True)
    return [each for each, loss in rows if loss <= SURE * len(each[1])]
