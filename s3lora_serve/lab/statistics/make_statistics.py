"""Make the statistics of a base model, one layer at a time, there and back."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from s3lora_serve.alignment.checkpoint import Checkpoint, config_digest
from s3lora_serve.lab.base_model.judge import check_aligned, is_refusal
from s3lora_serve.lab.base_model.language_model import LanguageModel, common_length
from s3lora_serve.lab.base_model.probes import ProbeFile
from s3lora_serve.lab.statistics.input_statistics import HARMFUL, Choice, Examples, collect
from s3lora_serve.lab.statistics.layer_pass import ExampleBatch, batches, decoder_layers
from s3lora_serve.lab.statistics.refusal_gradients import back_through_layer, gradients_at_the_end
from s3lora_serve.lab.statistics.routed_experts import name_experts
from s3lora_serve.lab.statistics.statistics_parts import Parts
from s3lora_serve.lab.tokens import ANSWER_TOKENS, JUDGED_TOKENS
from s3lora_serve.repair.statistics_file import (
    OUTPUT_PARTS,
    PARTS,
    SHIFT,
    ProbesRecord,
    StatisticsMetadata,
)

Progress = Callable[[str, int, int], None]
"""A phase's name, steps done, and all steps."""


@dataclass(frozen=True, slots=True)
class Benign:
    """A file of benign probes and its weight among them."""

    file: ProbeFile
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class StatisticsProbes:
    """What the base model is asked: prompts that it refuses, and prompts that it answers."""

    harmful: ProbeFile
    benign: Sequence[Benign]


def make_statistics(
    base: Path,
    probes: StatisticsProbes,
    target: Path,
    choice: Choice,
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> StatisticsMetadata:
    """Write the statistics of a base model, whole or not at all.

    What each layer yields is kept in a folder beside the target until all are made; `resume` goes
    on with those.

    Raises:
        BaseModelUnfit, CheckpointUnfit: the base model cannot be loaded, or has no list of layers.
        BaseUnaligned: the base model complies with most harmful probes.
        ProbesInvalid: their inputs have no covariance.
        FileExistsError: the target exists.
        OSError: it cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; name a file that does not")
    progress("digest", 0, 1)
    digest = (checkpoint := Checkpoint.open(base)).digest
    progress("digest", 1, 1)
    asked = probes.harmful.digest, *_asked(probes.benign)
    settings = json.dumps([digest, *asked, repr(choice), *PARTS, *OUTPUT_PARTS, SHIFT])
    parts = Parts(target, settings, resume=resume)
    model = LanguageModel.load(base, device, dtype, offload=parts.offload)
    examples = _examples(model, probes.harmful, probes.benign, progress)
    name_experts(model.model, checkpoint.shapes)
    weights = {_kind(i): each.weight for i, each in enumerate(probes.benign)}
    skipped = common_length([prompt for pairs in examples.values() for prompt, _ in pairs])
    found = batches(model, dict(examples), skipped)
    layers = _pass_through(model, found, parts, weights, choice, progress)
    about = StatisticsMetadata(
        rank=choice.rank,
        output_rank=choice.output_rank,
        epsilon=choice.epsilon,
        base_digest=digest,
        config_digest=config_digest(base),
        probes=tuple(_records(examples, _tokens(found), probes.harmful, probes.benign)),
        s3lora_serve=version("s3lora-serve"),
        shifts=True,
        sites=parts.sites(layers),
    )
    parts.assemble(about, target)
    return about


def _pass_through(
    model: LanguageModel,
    found: Sequence[ExampleBatch],
    parts: Parts,
    weights: Mapping[str, float],
    choice: Choice,
    progress: Progress,
) -> int:
    """Run all examples through one layer after the other, and gradients of refusals back.

    Returns the number of layers.
    """
    refused = [batch for batch in found if batch.kind == HARMFUL]
    name, layers = decoder_layers(model.model)
    for place, layer in enumerate(layers):
        parts.keep(place, [batch.hidden for batch in refused])
        sums = collect(layer, place, f"{name}.{place}", found, model.device)
        parts.write_inputs(place, sums, weights, choice)
        progress("layers", place + 1, len(layers))
    gradients = gradients_at_the_end(model, refused)
    for place in reversed(range(len(layers))):
        where, inputs, directions = f"{name}.{place}", parts.take(place), parts.directions(place)
        back = back_through_layer(
            layers[place], place, where, refused, inputs, gradients, directions, model.device
        )
        parts.write_outputs(place, back, sum(len(batch.answers) for batch in refused), choice)
        progress("gradients", len(layers) - place, len(layers))
    return len(layers)


def _tokens(found: Sequence[ExampleBatch]) -> Counter[str]:
    """The counted tokens of each kind."""
    counts: Counter[str] = Counter()
    for batch in found:
        counts[batch.kind] += int(batch.counted.sum())
    return counts


def _asked(benign: Sequence[Benign]) -> list[str]:
    return [f"{each.file.digest} {each.weight:g}" for each in benign]


def _kind(place: int) -> str:
    return f"benign {place}"


def _examples(
    model: LanguageModel, harmful: ProbeFile, benign: Sequence[Benign], progress: Progress
) -> Examples:
    """Prompts with the base model's own answers; harmful ones that it does not refuse are left
    out."""
    total, done = 1 + len(benign), 0
    prompts = [model.prompt(probe.prompt) for probe in harmful.probes]
    answers = model.greedy(prompts, JUDGED_TOKENS)
    refusals = [
        (prompt, model.answer(answer, end=False))
        for prompt, answer in zip(prompts, answers, strict=True)
        if is_refusal(answer)
    ]
    check_aligned(len(refusals), len(prompts), "harmful probes")
    progress("answers", done := done + 1, total)
    found = {HARMFUL: refusals}
    for place, each in enumerate(benign):
        prompts = [model.prompt(probe.prompt) for probe in each.file.probes]
        answers = model.greedy(prompts, ANSWER_TOKENS)
        found[_kind(place)] = [
            (prompt, model.answer(answer, end=False))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        progress("answers", done := done + 1, total)
    return found


def _records(
    examples: Examples, tokens: Mapping[str, int], harmful: ProbeFile, benign: Sequence[Benign]
) -> Iterator[ProbesRecord]:
    yield ProbesRecord(
        kind="harmful",
        digest=harmful.digest,
        count=len(examples[HARMFUL]),
        tokens=tokens[HARMFUL],
    )
    for place, each in enumerate(benign):
        yield ProbesRecord(
            kind="benign",
            digest=each.file.digest,
            count=len(examples[_kind(place)]),
            tokens=tokens[_kind(place)],
            weight=each.weight,
        )
