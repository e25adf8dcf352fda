"""Files that `s3lora serve` and its processes write, and their removal when the server ends."""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from s3lora_serve.settings import Settings
from s3lora_serve.store.adapter_store import AdapterStore

METRICS_NAME = "metrics"


class ServerFiles:
    """The files of one server. Use as a context manager around its life.

    They lie in this process's folder in the temporary folder's store, which it locks as long as it
    runs. The next server removes the folders of killed servers, which have no lock.
    """

    def __init__(self, settings: Settings) -> None:
        """Write nothing yet."""
        self._own = AdapterStore(Path(tempfile.gettempdir()))
        self._store = AdapterStore(settings.state_dir)

    def __enter__(self) -> Self:
        """Remove the files of killed servers, and create the folder.

        Raises:
            GateFailed: no space or no permission.
        """
        self._clean()
        self._own.process_folder()
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
        folder = self._own.process_folder() / METRICS_NAME
        folder.mkdir()
        return folder

    def _clean(self) -> None:
        """Empty the store in the temporary folder once no server runs.

        The operator's own state folder keeps its stored copies, within `store.max_bytes`.
        """
        self._own.close(clear=True)
        if self._store.root != self._own.root:
            self._store.close(clear=False)
