"""The base model of many calibrations: loaded once, and asked once for what no adapter changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from s3lora_serve.adapter.reader import Adapter
from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.calibration.gates import GatedAdapter, attach

MOST_ANSWERS = 16
"""Lists of prompts whose answers are remembered: those of the probes are four, and each adapter may
ask for one of its own."""

Prompts = tuple[tuple[int, ...], ...]


class CalibrationBase:
    """A base model in a folder, loaded on first use."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "bfloat16") -> None:
        """Name the folder, where the model runs, and the dtype of its weights."""
        self.folder = folder
        self._device, self._dtype = device, dtype
        self._answers: dict[tuple[Prompts, int], list[str]] = {}

    @cached_property
    def model(self) -> LanguageModel:
        """The model.

        Raises:
            BaseModelUnfit: it cannot be loaded.
        """
        return LanguageModel.load(self.folder, self._device, self._dtype)

    @contextmanager
    def with_adapter(self, adapter: Adapter) -> Iterator[GatedAdapter]:
        """Within this context the model has an adapter's gated layers.

        Raises:
            DoesNotFitModel: the model has no such linear layer, or it has another shape.
        """
        gated = attach(self.model.model, adapter)
        try:
            yield gated
        finally:
            gated.detach()

    def answers(
        self,
        gated: GatedAdapter,
        prompts: Sequence[Encoded],
        tokens: int,
        done: Callable[[int], None] = lambda _: None,
    ) -> list[str]:
        """The base model's own greedy answers; the adapter stays removed where they were made."""
        key = tuple(map(tuple, prompts)), tokens
        if key not in self._answers:
            gated.remove()
            self._answers[key] = self.model.greedy(prompts, tokens, done)
        found = self._answers.pop(key)
        self._answers[key] = found  # the last of the dictionary, which keeps its order
        while len(self._answers) > MOST_ANSWERS:
            del self._answers[next(iter(self._answers))]
        return found
