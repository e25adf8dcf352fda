"""What `s3lora serve` and its processes write to disk, and removing it when they have ended."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from s3lora_serve.settings import Settings
from s3lora_serve.store import Store

METRICS_NAME = "metrics"


class ServerFiles:
    """The files of one server. Use as a context manager around its life.

    They lie in a folder that this process locks for its life, beside the store of the temporary
    folder: what a killed server left is known by its lock, and removed by the next one.
    """

    def __init__(self, settings: Settings) -> None:
        """Plan them; nothing is written yet."""
        self._own = Store(Path(tempfile.gettempdir()))
        self._store = Store(settings.state_dir)

    def __enter__(self) -> Self:
        """Remove what killed servers left, and make the folder.

        Raises:
            GateFailed: there is no room or right to.
        """
        self._clean()
        self._own.own_folder()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()

    def metrics(self) -> Path:
        """A new folder for the metrics of the server's processes."""
        folder = self._own.own_folder() / METRICS_NAME
        folder.mkdir()
        return folder

    def _clean(self) -> None:
        """The temporary folder is emptied when no server is left; a state folder of the operator's
        keeps its copies, which `store.max_bytes` bounds."""
        self._own.leave(clear=True)
        if self._store.root != self._own.root:
            self._store.leave(clear=False)
