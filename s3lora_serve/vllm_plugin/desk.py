"""Where one process of a server decides on adapters: copy, score, rule, keep. Both sides use it."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from s3lora_serve.admission import admit
from s3lora_serve.errors import AdapterRejected, PolicyInvalid, Reason
from s3lora_serve.live_policy import LivePolicy
from s3lora_serve.policy import Policy
from s3lora_serve.settings import Settings
from s3lora_serve.store import Store
from s3lora_serve.verdict import Verdict, refused, rejected
from s3lora_serve.vllm_plugin.recorder import Recorder

MOST_REMEMBERED = 1000
"""Adapters a process remembers something of; tenants choose the names."""


class Refused(AdapterRejected):
    """A refusal on its way through vLLM, which keeps only the text."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


class Desk:
    """Policy, store and recorder of one process."""

    def __init__(self, settings: Settings) -> None:
        """Read the policy.

        Raises:
            PolicyInvalid, SettingInvalid: it is not valid.
        """
        self.settings = settings
        self.store = Store(settings.state_dir)
        self._live = LivePolicy(settings)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._live.current

    @cached_property
    def recorder(self) -> Recorder:
        """Made when first asked for: what registers metrics shows in them."""
        return Recorder(self.policy, self.settings)

    def refresh(self) -> Policy:
        """The policy in force after a look at its file; one that is not valid changes nothing."""
        try:
            return self._live.refresh()
        except PolicyInvalid as error:
            self.recorder.policy_kept(str(error), self.policy)
            return self.policy

    def decide(
        self,
        folder: Path,
        name: str,
        base_model: str | None,
        shapes: Collection[tuple[int, int]],
        *,
        keep_refused: bool,
    ) -> tuple[Verdict, Path | None]:
        """The decision on an adapter, and where it is kept, pinned.

        Raises:
            AuditFailed: the policy lets nothing in that cannot be written down.
            GateFailed, StoreFull: the store cannot take it.
        """
        policy = self.refresh()
        self.recorder.require_audit(policy)
        with self.store.fresh() as private:
            verdict = admit(
                folder,
                name,
                policy,
                base_model=base_model,
                device=self.settings.device,
                into=private.make,
                shapes=shapes,
            ).verdict
            if refused(verdict) and not keep_refused:
                return verdict, None
            return verdict, self.store.keep(private, verdict, policy.store.max_bytes)

    def recheck(
        self,
        before: Verdict,
        kept: Path,
        base_model: str | None,
        shapes: Collection[tuple[int, int]],
    ) -> Verdict:
        """What the policy in force now decides on an adapter that is kept; nothing is changed."""
        policy = self.refresh()
        try:
            self.store.open(kept)
        except AdapterRejected as damage:
            ruled = replace(before, policy_digest=policy.digest, mode=policy.mode)
            return rejected(ruled, Reason.of(damage))
        return admit(
            kept,
            before.name,
            policy,
            base_model=base_model,
            device=self.settings.device,
            shapes=shapes,
            origin=Path(before.path),
        ).verdict


def remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> Any:
    """Put an entry last, and let the first go when there are too many; return what went."""
    known[key] = value
    known.move_to_end(key)
    return known.popitem(last=False)[1] if len(known) > MOST_REMEMBERED else None
