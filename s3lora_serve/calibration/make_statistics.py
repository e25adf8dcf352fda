"""Make the statistics of a base model's inputs, one layer at a time."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from s3lora_serve.adapter.tensor_parts import assemble, begin_parts
from s3lora_serve.alignment.checkpoint import Checkpoint, config_digest
from s3lora_serve.calibration.input_statistics import (
    HARMFUL,
    Choice,
    Covariances,
    Examples,
    collect,
)
from s3lora_serve.calibration.judge import JUDGED_TOKENS, check_aligned, is_refusal
from s3lora_serve.calibration.language_model import LanguageModel
from s3lora_serve.calibration.probes import ProbeFile
from s3lora_serve.errors import ProbesInvalid
from s3lora_serve.repair.statistics_file import METADATA_KEY, PARTS, About, ProbesRecord, SiteRecord

ANSWER_TOKENS = 24
"""Tokens of the base model's own answer to a benign prompt whose inputs count. Ours."""

Progress = Callable[[str, int, int], None]
"""A phase's name, steps done, and all steps."""


@dataclass(frozen=True, slots=True)
class Benign:
    """A file of benign probes and its weight among them."""

    file: ProbeFile
    weight: float = 1.0


def make_statistics(
    base: Path,
    harmful: ProbeFile,
    benign: Sequence[Benign],
    target: Path,
    choice: Choice,
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> About:
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
    digest = Checkpoint.open(base).digest
    progress("digest", 1, 1)
    settings = json.dumps([digest, harmful.digest, *_asked(benign), repr(choice)])
    parts = Parts(begin_parts(target, settings, resume=resume))
    model = LanguageModel.load(base, device, dtype, offload=parts.offload)
    examples = _examples(model, harmful, benign, progress)
    weights = {_kind(i): each.weight for i, each in enumerate(benign)}
    records: dict[str, SiteRecord] = {}
    tokens: dict[str, int] = {}

    def made(layer: int, sums: Covariances) -> None:
        records.update(parts.kept(layer) or parts.write(layer, sums, weights, choice))
        for counts in list(sums.counts.values())[:1]:
            tokens.update(counts)

    collect(model, examples, made, lambda done, total: progress("layers", done, total))
    about = About(
        rank=choice.rank,
        epsilon=choice.epsilon,
        base_digest=digest,
        config_digest=config_digest(base),
        probes=tuple(_records(examples, tokens, harmful, benign)),
        s3lora_serve=version("s3lora-serve"),
        sites=records,
    )
    parts.assemble(about, target)
    return about


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


class Parts:
    """The folder beside a target with what each layer yielded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def offload(self) -> Path:
        """Where weights lie that are kept in another dtype than the checkpoint's."""
        return self._folder / "offload"

    def kept(self, layer: int) -> dict[str, SiteRecord] | None:
        """The records of a layer that was made already."""
        note = self._folder / f"{layer}.json"
        if not note.exists():
            return None
        found = json.loads(note.read_text())
        return {site: SiteRecord.model_validate(record) for site, record in found.items()}

    def write(
        self, layer: int, sums: Covariances, weights: Mapping[str, float], choice: Choice
    ) -> dict[str, SiteRecord]:
        """Make and keep the statistics of a layer's sites."""
        records, tensors = {}, {}
        for modules in sums.sums:
            site = modules[0]
            try:
                found = sums.statistics(modules, weights, choice)
            except ValueError as error:
                raise ProbesInvalid(f"{site}: {error}") from None
            statistics, outputs = found.statistics, sums.outputs(modules)
            if silent := [module for module, output in outputs.items() if not output > 0]:
                raise ProbesInvalid(f"{silent[0]} puts out nothing on harmful probes")
            records[site] = SiteRecord(
                outputs=outputs,
                ridge=statistics.ridge,
                beyond=statistics.beyond,
                harmful_captured=found.harmful_captured,
                benign_captured=found.benign_captured,
            )
            for part in PARTS:
                tensors[f"{site}.{part}"] = getattr(statistics, part).contiguous()
        save_file(tensors, self._folder / f"{layer}.safetensors")
        plain = {site: record.model_dump(mode="json") for site, record in records.items()}
        partial = self._folder / f"{layer}.partial"
        partial.write_text(json.dumps(plain))
        partial.rename(self._folder / f"{layer}.json")  # last: it marks the layer as made
        return records

    def assemble(self, about: About, target: Path) -> None:
        """Write the one file, and remove the folder."""
        metadata = {METADATA_KEY: about.model_dump_json()}
        assemble(self._folder, target, self._tensors, metadata)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in sorted(self._folder.glob("*.safetensors"), key=lambda file: int(file.stem)):
            yield from sorted(load_file(file).items())
