"""A saved search, from which a calibration goes on after an interruption."""

import pickle
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class SearchFile:
    """A file beside the plan that is to be written, in which the search is saved."""

    path: Path
    resume: bool = False  # whether to go on with it, if it is of the same calibration


@dataclass(frozen=True, slots=True)
class SavedSearch:
    """The state of one search in its file."""

    file: SearchFile
    key: str  # of adapter, probes and options: a search goes on only with the same

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    def load(self) -> dict[str, Any] | None:
        """The saved state; None if there is none, or it is another calibration's."""
        if not self.file.resume or not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # cut off while it was written: begin anew
        return saved if saved.get("key") == self.key else None

    def save(self, **state: Any) -> None:
        """Save the state, whole or not at all."""
        part = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")
        torch.save({"key": self.key, **state}, part)
        part.replace(self.path)

    def remove(self) -> None:
        """Remove the file: the calibration has ended."""
        self.path.unlink(missing_ok=True)
