"""A saved search, from which a calibration goes on after an interruption."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class SavedSearch:
    """A file beside the plan that is to be written."""

    path: Path
    key: str  # of adapter, probes and options: a search goes on only with the same
    resume: bool

    def load(self) -> dict[str, Any] | None:
        """The saved state; None if there is none, or it is another calibration's."""
        if not self.resume or not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # cut off while it was written: begin anew
        return saved if saved.get("key") == self.key else None

    def save(self, **state: Any) -> None:
        """Save the state, whole or not at all."""
        part = self.path.with_name(self.path.name + ".part")
        torch.save({"key": self.key, **state}, part)
        part.replace(self.path)

    def remove(self) -> None:
        """Remove the file: the calibration has ended."""
        self.path.unlink(missing_ok=True)
