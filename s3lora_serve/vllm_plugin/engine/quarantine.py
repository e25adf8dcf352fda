"""Quarantine: an adapter that the engine cannot do without and must not serve has no effect."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from s3lora_serve.admission.verdict import Verdict, unread_verdict
from s3lora_serve.errors import GateFailed, Reason
from s3lora_serve.policy.lengths import MAX_NAME
from s3lora_serve.store.stored_copy import is_servable
from s3lora_serve.vllm_plugin import compat
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess


class Quarantine:
    """The quarantined stored copies, which all ranks of a machine share."""

    def __init__(self, process: GuardedProcess) -> None:
        self._process = process

    def has(self, stored_path: Path) -> bool:
        """Whether a stored copy is quarantined, on any rank."""
        return self._process.store.is_quarantined(stored_path)

    def has_path(self, path: str) -> bool:
        """Whether this is the path of a stored copy that is quarantined."""
        stored = self._process.store.find(path)
        return stored is not None and self.has(stored)

    def put(
        self,
        request: Any,
        stored_path: Path | None,
        reason: Reason,
        verdict: Verdict | None,
        path: str,
    ) -> None:
        """Mark the stored copy for all ranks, and report the quarantine once.

        Args:
            request: vLLM's request for the adapter.
            stored_path: the stored copy, if there is one.
            reason: why the adapter is not served.
            verdict: the stored verdict; None if it could not be read.
            path: the path that the adapter was registered with.
        """
        if stored_path is not None and (verdict is None or is_servable(verdict)):
            try:
                self._process.store.quarantine(stored_path)
            except GateFailed as error:  # other ranks cannot learn of it
                compat.logger.error("s3lora: %s", error)
        if compat.is_first_rank():
            name = request.lora_name[:MAX_NAME]
            known = verdict or unread_verdict(name, path, self._process.policy)
            self._process.events.quarantined(replace(known, name=name, path=path), reason)
