"""A model run layer by layer over many examples, so that one layer at a time is in memory.

What each layer puts out for all examples is kept for the next. Weights that do not fit in memory
are read once for each batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.errors import BaseModelUnfit
from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.base_model.padded_batches import counted_tokens, last_logits
from s3lora_serve.lab.statistics.routed_experts import ExpertProjection

BATCH = 16
"""Examples in one pass through a layer."""


@dataclass(slots=True)
class ExampleBatch:
    """Examples of one kind, and where they are in the model."""

    kind: str
    ids: Tensor  # (examples, tokens), padded on the left
    mask: Tensor  # (examples, tokens), 0 where padded
    answers: list[int]  # tokens of each example's answer, which end its row
    hidden: Tensor  # (examples, tokens, width), the input of the next layer, on the host
    counted: Tensor  # (examples, tokens) bool: tokens that statistics are of
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # other arguments, for each layer


Tokens = Tensor | None
"""Places of the tokens that a routed expert gets, among all of a batch; None if it is all."""

Observer = Callable[[tuple[str, ...], Tensor, ExampleBatch, Tokens], None]
"""Called with the names of the linear modules that share an input, the input, its batch, and which
tokens of it there are."""


def decoder_layers(model: Any) -> tuple[str, Any]:
    """The name and the list of a model's layers.

    Raises:
        BaseModelUnfit: it has no single list of layers.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    names = tuple(f"{name}." for name, _ in lists)
    lists = [(name, module) for name, module in lists if not name.startswith(names)]
    if len(lists) != 1:
        raise BaseModelUnfit(f"{type(model).__name__} has {len(lists)} lists of all its layers")
    return lists[0]


@torch.no_grad()
def batches(
    model: LanguageModel, examples: dict[str, Sequence[tuple[Encoded, Encoded]]], skipped: int
) -> list[ExampleBatch]:
    """The examples as the first layer gets them; the first `skipped` tokens are not counted.

    The model runs with layers that only note how they are called.
    """
    _, layers = decoder_layers(model.model)
    found = []
    for kind, pairs in examples.items():
        ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        for start in range(0, len(ordered), BATCH):
            those = ordered[start : start + BATCH]
            tokens = [prompt + answer for prompt, answer in those]
            ids, mask = model.padded(tokens)
            counted = counted_tokens(mask, skipped)
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            with _instead(layers, _noting(calls)):
                last_logits(model, ids, mask, 1)
            hidden, rest = calls[0][0][0], [(args[1:], more) for args, more in calls]
            answers = [len(answer) for _, answer in those]
            found.append(ExampleBatch(kind, ids, mask, answers, hidden.cpu(), counted.cpu(), rest))
    return found


def given_hidden(
    model: LanguageModel, batch: ExampleBatch, hidden: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Logits for the first tokens of each answer, and these tokens, if the last layer puts out
    `hidden`.

    Shape: hidden (examples, tokens, width) -> (found, vocabulary) float32, (found,).
    """
    _, layers = decoder_layers(model.model)
    longest = max(batch.answers)
    with _instead(layers, lambda *_args, **_more: hidden):
        logits = last_logits(model, batch.ids, batch.mask, longest + 1)
    rows, targets = [], []
    for row, count in enumerate(batch.answers):
        those = min(first, count)
        rows.append(logits[row, longest - count :][:those])
        targets.append(batch.ids[row, batch.ids.shape[1] - count :][:those])
    return torch.cat(rows).float(), torch.cat(targets)


def _noting(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[..., Tensor]:
    """A layer that notes its arguments and returns its input."""

    def noting(hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
        calls.append(((hidden_states, *args), more))
        return hidden_states

    return noting


@contextmanager
def _instead(layers: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within this context each layer does this."""
    originals = [layer.forward for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.forward = original


@torch.no_grad()
def run_layer(
    layer: Any,
    place: int,
    name: str,
    found: Sequence[ExampleBatch],
    observe: Observer,
    device: torch.device,
) -> None:
    """Run one layer on all batches; `observe` sees each input of its linear modules once."""
    for batch in found:
        args, more = batch.calls[place]
        with _observed(layer, name, batch, observe):
            output = layer(batch.hidden.to(device), *args, **more)
        batch.hidden = hidden_of(output).cpu()


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def hooked(layer: Any, name: str, register: Callable[[Any, str], Any]) -> Iterator[None]:
    """Within this context each linear module of the layer has the hook that `register` gives it.

    A routed expert's projections have one each, by the names of the checkpoint.
    """
    hooks = []
    for inner, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(register(module, f"{name}.{inner}"))
        elif isinstance(module, ExpertProjection):
            hooks.append(register(module, module.name))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _observed(layer: Any, name: str, batch: ExampleBatch, observe: Observer) -> Iterator[None]:
    """After this context `observe` gets each input with the modules that took it."""
    # Keeps inputs: no two have one address.
    taken: dict[int, tuple[Tensor, list[str], Tokens]] = {}

    def noting(module: Any, module_name: str) -> Any:
        def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            tokens = None if getattr(module, "takes_all", True) else module.tokens
            taken.setdefault(id(inputs[0]), (inputs[0], [], tokens))[1].append(module_name)

        return module.register_forward_pre_hook(note)

    with hooked(layer, name, noting):
        yield
    for inputs, modules, tokens in taken.values():
        observe(tuple(modules), inputs, batch, tokens)


def counted_rows(batch: ExampleBatch, values: Tensor, tokens: Tokens) -> Tensor:
    """The counted tokens' inputs or outputs of a module, (counted, width).

    Raises:
        BaseModelUnfit: the module gets some of the tokens, and is no routed expert.
    """
    counted = batch.counted.to(values.device).flatten()
    if tokens is not None:
        return values[counted[tokens]]
    width = values.shape[-1]
    if values.numel() != counted.numel() * width:
        raise BaseModelUnfit(
            f"a linear module has values of the shape {tuple(values.shape)} for"
            f" {tuple(batch.counted.shape)} tokens: statistics need all tokens of each module"
        )
    return values.reshape(-1, width)[counted]
