"""Covariances of the inputs of a base model's linear modules, and the statistics made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3lora_serve.calibration.language_model import Encoded, LanguageModel, common_length
from s3lora_serve.calibration.layer_pass import Batch, batches, decoder_layers, run_layer
from s3lora_serve.errors import BaseModelUnfit
from s3lora_serve.spectral.projection_pairs import Pairs, projection_pairs

HARMFUL = "harmful"

Examples = Mapping[str, Sequence[tuple[Encoded, Encoded]]]
"""Prompts with the base model's answers: harmful ones, and those of each file of benign ones."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How statistics are made."""

    rank: int = 64
    epsilon: float = 0.1
    dtype: torch.dtype = torch.bfloat16


class Covariances:
    """Sums of x·xᵀ over the counted tokens of each kind, for the sites of one layer, and of ‖W·x‖²
    over harmful ones, for its modules."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self.sums: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.counts: dict[tuple[str, ...], dict[str, int]] = {}
        self._outputs: dict[str, float] = {}

    def add(self, outputs: dict[str, Tensor], inputs: Tensor, batch: Batch) -> None:
        """Add the counted tokens of one input, (examples, tokens, n) or (examples·tokens, n), and
        of what its modules make of it.

        Raises:
            BaseModelUnfit: the modules get some of the tokens, as routed experts do.
        """
        n, modules = inputs.shape[-1], tuple(outputs)
        if inputs.numel() != batch.counted.numel() * n:
            raise BaseModelUnfit(
                f"module {modules[0]} gets {tuple(inputs.shape)} for {tuple(batch.counted.shape)}"
                " tokens: statistics need all tokens of each module"
            )
        counted = batch.counted.to(inputs.device)
        rows = inputs.reshape(*counted.shape, n)[counted].double()
        sums = self.sums.setdefault(
            modules,
            {k: torch.zeros(n, n, dtype=torch.float64, device=rows.device) for k in self._kinds},
        )
        sums[batch.kind].addmm_(rows.mT, rows)
        counts = self.counts.setdefault(modules, dict.fromkeys(self._kinds, 0))
        counts[batch.kind] += len(rows)
        if batch.kind == HARMFUL:
            for module, output in outputs.items():
                those = output.reshape(*counted.shape, output.shape[-1])[counted]
                before = self._outputs.get(module, 0.0)
                self._outputs[module] = before + float(those.double().square().sum())

    def outputs(self, modules: tuple[str, ...]) -> dict[str, float]:
        """`E‖W·x‖²` over harmful inputs of the modules of one site."""
        count = max(1, self.counts[modules][HARMFUL])
        return {module: self._outputs[module] / count for module in modules}

    def statistics(
        self, modules: tuple[str, ...], weights: Mapping[str, float], choice: Choice
    ) -> Pairs:
        """Statistics of one site: `C_h`, and `C_b` as the weighted mean over benign kinds.

        Raises:
            ValueError: the inputs of a kind are all zero or not finite.
        """
        means = {
            kind: total / max(1, self.counts[modules][kind])
            for kind, total in self.sums[modules].items()
        }
        C_h = means.pop(HARMFUL)
        total = sum(weights[kind] for kind in means)
        C_b = sum((weights[kind] / total * mean for kind, mean in means.items()), 0 * C_h)
        return projection_pairs(
            C_h, C_b, rank=choice.rank, epsilon=choice.epsilon, dtype=choice.dtype
        )


def collect(
    model: LanguageModel,
    examples: Examples,
    made: Callable[[int, Covariances], None],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Run the model on the examples; `made` gets each layer's number and covariances in turn."""
    skipped = common_length([prompt for pairs in examples.values() for prompt, _ in pairs])
    found = batches(model, dict(examples), skipped)
    name, layers = decoder_layers(model.model)
    for place, layer in enumerate(layers):
        sums = Covariances(tuple(examples))
        run_layer(layer, place, f"{name}.{place}", found, sums.add, model.device)
        made(place, sums)
        progress(place + 1, len(layers))
