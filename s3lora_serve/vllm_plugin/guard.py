"""The choke point: what a worker loads is what was admitted, or has no effect. Nothing raises.

An exception here would stop the engine of every tenant, or leave the ranks of a tensor-parallel
engine out of step.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s3lora_serve.errors import (
    AdapterRejected,
    GateFailed,
    NotAnAdapter,
    Reason,
    RefusedByVLLM,
    StoreDamaged,
)
from s3lora_serve.store import Kept, servable
from s3lora_serve.verdict import Verdict, unknown
from s3lora_serve.vllm_plugin import compat, patches, served_model
from s3lora_serve.vllm_plugin.desk import Desk, Refused, remember
from s3lora_serve.vllm_plugin.enforcement import enforced
from s3lora_serve.vllm_plugin.preparation import Preparation
from s3lora_serve.vllm_plugin.served_model import WorkerModel

logger = compat.logger


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What loading an admitted copy came to."""

    kept: Kept | None
    result: Any  # vLLM's LoRAModel, or the AdapterRejected that says why there is none
    seconds: float


class Guard:
    """The gate of one worker process."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.model = WorkerModel()
        self._preparation = Preparation()
        self._registering = False
        self._refusals: OrderedDict[int, Reason] = OrderedDict()
        self._origins: OrderedDict[tuple[int, str], Path] = OrderedDict()
        self._held: OrderedDict[int, str] = OrderedDict()

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """A worker has its LoRA modules: learn their names and say that the gate is up."""
        self.model = WorkerModel.of(manager, vllm_config)
        self.desk.recorder.metrics.know_model(self.model.places)
        self.show_policy()

    def show_policy(self) -> None:
        """Say in metrics and log which policy is in force here."""
        policy, release = self.desk.policy, version("s3lora-serve")
        self.desk.recorder.metrics.activate(policy.digest, policy.mode, release)
        logger.info("s3lora %s: gate in mode %s, policy %s", release, policy.mode, policy.digest)

    @contextmanager
    def registration(self) -> Iterator[None]:
        """While this lasts, whoever waits for the load asks whether it was refused."""
        self._registering = True
        try:
            yield
        finally:
            self._registering = False

    def load(self, manager: Any, request: Any, original: Callable[..., Any]) -> Any:
        """Load an adapter in the place of vLLM's `_load_adapter`; what is refused has no effect."""
        adapter_id = request.lora_int_id
        attempt = self._attempted(manager, request, original)
        verdict = attempt.kept.verdict if attempt.kept else None
        if attempt.kept is None or isinstance(attempt.result, Exception):
            return self._quarantined(request, _reason(attempt.result, verdict), verdict)
        kept = attempt.kept
        if compat.is_first_rank():
            if self._registering:
                self.desk.recorder.metrics.observe_strip(attempt.seconds)
            elif self._held.get(adapter_id) == kept.path.name:
                self.desk.recorder.reloaded(replace(kept.verdict, name=request.lora_name), "store")
        self._refusals.pop(adapter_id, None)
        remember(self._held, adapter_id, kept.path.name)
        return attempt.result

    def is_prepared(self, name: str, path: str, adapter_id: int) -> bool:
        """Whether what is kept at a path is ready to be added; reading it begins with the asking.

        It is read beside the engine's steps: other tenants' tokens do not wait for it.
        """
        request = compat.request_for(name, path, adapter_id)
        if self.desk.store.find(path) is None:
            return True
        work = partial(self._attempt, self.model.manager, request, patches.load_adapter)
        return self._preparation.is_done(_key(request), work)

    def _attempted(self, manager: Any, request: Any, original: Callable[..., Any]) -> _Attempt:
        """The attempt that was prepared, or else one made now."""
        prepared: _Attempt | None = self._preparation.take(_key(request))
        return prepared or self._attempt(manager, request, original)

    def _attempt(self, manager: Any, request: Any, original: Callable[..., Any]) -> _Attempt:
        """Open the admitted copy and have vLLM load it; raises nothing."""
        started, kept, result = time.perf_counter(), None, None
        try:
            kept = self._kept(request)
            result = enforced(manager, request, original, kept)
        except AdapterRejected as refusal:
            result = refusal
        except Exception as error:
            logger.exception("s3lora: adapter %r", request.lora_name)
            result = GateFailed(f"{type(error).__name__}: {error}")
        return _Attempt(kept, result, time.perf_counter() - started)

    def add(self, manager: Any, request: Any, original: Callable[..., bool]) -> bool:
        """Add an adapter to the engine in the place of `add_adapter`, never half.

        vLLM marks an adapter active before it fills its slot: whatever goes wrong in between would
        leave later modules with the slot's last tenant.
        """
        held = self._held.get(request.lora_int_id)
        expected = self._expected(request)
        if held and expected and (held != expected.name or self.desk.store.is_condemned(expected)):
            # Another adapter's id, or another rank could not load it: no rank serves it then.
            manager.remove_adapter(request.lora_int_id)
        try:
            return original(manager, request)
        except Exception as error:
            logger.exception("s3lora: adapter %r", request.lora_name)
            manager.remove_adapter(request.lora_int_id)
            failed = RefusedByVLLM(f"vLLM says: {type(error).__name__}: {error}")
            empty = self._quarantined(request, Reason.of(failed), None)
            return served_model.add_loaded(manager, empty)
        finally:
            # vLLM keeps the request for its later steps, which are to read nothing again.
            request.load_inplace = False

    def is_quarantined(self, path: str) -> bool:
        """Whether what lies at a path of the store has lost its update, on whichever rank."""
        named = self.desk.store.find(path)
        return named is not None and self.desk.store.is_condemned(named)

    def refusal(self, adapter_id: int) -> Reason | None:
        """Why this worker holds an adapter without effect, if it does."""
        return self._refusals.get(adapter_id)

    def holds(self, adapter_id: int) -> str | None:
        """The store's name for what this worker loaded under an id."""
        return self._held.get(adapter_id)

    def trial(self, name: str, path: str, adapter_id: int) -> Reason | None:
        """Why this worker would not serve what is kept at a path, if it would not."""
        request = compat.request_for(name, path, adapter_id)
        result = self._attempted(self.model.manager, request, patches.load_adapter).result
        return Reason.of(result) if isinstance(result, AdapterRejected) else None

    def _expected(self, request: Any) -> Path | None:
        """Where the admitted copy lies, if it is known."""
        named = self.desk.store.find(request.lora_path)
        return named or self._origins.get((request.lora_int_id, request.lora_path))

    def _kept(self, request: Any) -> Kept:
        """The admitted copy: the one the request names, or one that is decided on here."""
        path = self.desk.store.find(request.lora_path)
        if path is None:
            path = None if request.load_inplace else self._expected(request)
            if path is None:
                path = self._decide(request)
                origin = (request.lora_int_id, request.lora_path)
                before = self._origins.get(origin)
                for old in (before, remember(self._origins, origin, path)):
                    if old is not None:
                        self.desk.store.release(old)
        if self.desk.store.is_condemned(path):
            raise StoreDamaged(f"{path} could not be loaded, here or on another rank")
        return self.desk.store.open(path)

    def _decide(self, request: Any) -> Path:
        """Decide on an adapter that no API server registered: `LLM.generate` and the like."""
        folder = compat.adapter_folder(request, download=not self.desk.policy.limits.roots)
        if folder is None:
            raise NotAnAdapter(f"{request.lora_path} does not exist")
        shapes = self.model.shapes if self.model.whole else ()
        verdict, path = self.desk.decide(
            folder, request.lora_name, self.model.base_model, shapes, keep_refused=True
        )
        if path is None:
            raise Refused(str(verdict.reason))
        passing = verdict.reason and verdict.reason.code.startswith("S3LORA-4")
        if verdict.digest and not passing:
            # Ranks score for themselves; should they differ, the first to be done rules for all.
            content = (verdict.digest, verdict.config_digest, verdict.policy_digest)
            model = (self.model.base_model, sorted(shapes))
            name = (version("s3lora-serve"), request.lora_name, str(folder))
            facts = (*name, *model, *content)
            path = self.desk.store.agree(repr(facts), path)
        if compat.is_first_rank():
            self.desk.recorder.decided(verdict, "engine")
        return path

    def _quarantined(self, request: Any, reason: Reason, verdict: Verdict | None) -> Any:
        """An adapter without effect in the place of one that is refused."""
        remember(self._refusals, request.lora_int_id, reason)
        self._held.pop(request.lora_int_id, None)
        path = self._expected(request)
        # A registrar that waits for this load asks, answers its client, and takes it back.
        asked = self._registering and self.desk.store.find(request.lora_path) is not None
        mode = verdict.mode if verdict else self.desk.policy.mode
        if asked and mode == "enforce":
            return served_model.inert_adapter(request)
        if path is not None and (verdict is None or servable(verdict)):
            self._condemn(path)
        if compat.is_first_rank():
            known = verdict or unknown(request.lora_name, request.lora_path, self.desk.policy)
            self.desk.recorder.quarantined(replace(known, name=request.lora_name), reason)
        return served_model.inert_adapter(request)

    def _condemn(self, path: Path) -> None:
        try:
            self.desk.store.condemn(path)
        except GateFailed as error:  # other ranks will not hear of it
            logger.error("s3lora: %s", error)


def _key(request: Any) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path


def _reason(refusal: AdapterRejected, verdict: Verdict | None) -> Reason:
    """The reason of a refusal; one that was decided before is the verdict's own."""
    if isinstance(refusal, Refused) and verdict and verdict.reason:
        return verdict.reason
    return Reason.of(refusal)
