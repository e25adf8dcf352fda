"""What making statistics keeps on the way: for each layer, beside the target, until all is made."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from s3lora_serve.adapter.tensor_parts import assemble, begin_parts
from s3lora_serve.errors import ProbesInvalid
from s3lora_serve.lab.statistics.input_statistics import Choice, Covariances
from s3lora_serve.lab.statistics.refusal_gradients import Sums
from s3lora_serve.repair.statistics_file import (
    METADATA_KEY,
    OUTPUT_PARTS,
    PARTS,
    SHIFT,
    OutputRecord,
    SiteRecord,
    StatisticsMetadata,
)
from s3lora_serve.spectral.output_directions import output_directions


class Parts:
    """The folder beside a target with what each layer yielded."""

    def __init__(self, target: Path, settings: str, *, resume: bool) -> None:
        self._folder = begin_parts(target, settings, resume=resume)

    @property
    def offload(self) -> Path:
        """Where weights lie that are kept in another dtype than the checkpoint's."""
        return self._folder / "offload"

    def keep(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Keep the inputs of a layer, for its gradients."""
        tensors = {str(i): each.contiguous() for i, each in enumerate(hidden)}
        save_file(tensors, self._kept(layer))

    def take(self, layer: int) -> list[Tensor]:
        """The kept inputs of a layer, which are kept no longer."""
        tensors = load_file(self._kept(layer))
        self._kept(layer).unlink()
        return [tensors[str(i)] for i in range(len(tensors))]

    def write_inputs(
        self, layer: int, sums: Covariances, weights: Mapping[str, float], choice: Choice
    ) -> None:
        """Make the statistics of a layer's sites, if an interrupted run has not.

        Raises:
            ProbesInvalid: the inputs of a site have no covariance.
        """
        if self._note(layer, "inputs").exists():
            return
        records, tensors = {}, {}
        for modules in sums.sums:
            site = modules[0]
            try:
                found = sums.statistics(modules, weights, choice)
            except ValueError as error:
                raise ProbesInvalid(f"{site}: {error}") from None
            records[site] = {
                "outputs": list(modules),
                "ridge": found.statistics.ridge,
                "mu_rest": found.statistics.mu_rest,
                "beyond": found.statistics.beyond,
                "harmful_captured": found.harmful_captured,
                "benign_captured": found.benign_captured,
            }
            for part in PARTS:
                tensors[f"{site}.{part}"] = getattr(found.statistics, part).contiguous()
        self._write(layer, "inputs", records, tensors)

    def directions(self, layer: int) -> dict[str, Tensor]:
        """The V of the inputs of each of a layer's modules."""
        note = self._note(layer, "inputs")
        tensors = load_file(note.with_suffix(".safetensors"))
        return {
            module: tensors[f"{site}.V"]
            for site, record in json.loads(note.read_text()).items()
            for module in record["outputs"]
        }

    def write_outputs(self, layer: int, sums: Sums, examples: int, choice: Choice) -> None:
        """Make the statistics of what a layer's modules put out, if an interrupted run has not.

        `examples` is the number of harmful prompts that the sums are of.

        Raises:
            ProbesInvalid: no refusal depends on a module.
        """
        if self._note(layer, "outputs").exists():
            return
        records, tensors = {}, {}
        for module, each in sums.items():
            try:
                found = output_directions(
                    each.gradients, rank=choice.output_rank, dtype=choice.dtype
                )
            except ValueError as error:
                raise ProbesInvalid(f"{module}: {error}") from None
            records[module] = {
                "gamma_rest": found.statistics.gamma_rest,
                "captured": found.captured,
                "energy": each.energy / each.count,
            }
            for part in OUTPUT_PARTS:
                tensors[f"{module}.{part}"] = getattr(found.statistics, part).contiguous()
            shift = found.statistics.Q.double().mT @ each.shift.cpu() / max(1, examples)
            tensors[f"{module}.{SHIFT}"] = shift.float()
        self._write(layer, "outputs", records, tensors)

    def sites(self, layers: int) -> dict[str, SiteRecord]:
        """The records of all sites.

        Raises:
            ProbesInvalid: no refusal depends on a module.
        """
        found = {}
        for layer in range(layers):
            inputs, outputs = (
                json.loads(self._note(layer, side).read_text()) for side in ("inputs", "outputs")
            )
            for site, record in inputs.items():
                if lacking := [module for module in record["outputs"] if module not in outputs]:
                    raise ProbesInvalid(f"{lacking[0]}: no refusal depends on what it puts out")
                own = {name: OutputRecord(**outputs[name]) for name in record["outputs"]}
                found[site] = SiteRecord(**record | {"outputs": own})
        return found

    def assemble(self, about: StatisticsMetadata, target: Path) -> None:
        """Write the one file, and remove the folder."""
        metadata = {METADATA_KEY: about.model_dump_json()}
        assemble(self._folder, target, self._tensors, metadata)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for file in sorted(self._folder.glob("*puts.safetensors"), key=_place):
            yield from sorted(load_file(file).items())

    def _kept(self, layer: int) -> Path:
        return self._folder / f"{layer}.hidden.safetensors"

    def _note(self, layer: int, side: str) -> Path:
        return self._folder / f"{layer}.{side}.json"

    def _write(
        self, layer: int, side: str, records: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        note = self._note(layer, side)
        save_file(tensors, note.with_suffix(".safetensors"))
        partial = note.with_suffix(".partial")
        partial.write_text(json.dumps(records))
        partial.rename(note)  # last: it marks the layer as made


def _place(file: Path) -> tuple[int, str]:
    layer, side, _ = file.name.split(".")
    return int(layer), side
