"""The choke point: what a worker loads is what was admitted, or has no effect. Nothing raises.

An exception here would stop the engine of every tenant, or leave the ranks of a tensor-parallel
engine out of step.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s3lora_serve.adapter import read_adapter
from s3lora_serve.errors import (
    AdapterRejected,
    GateFailed,
    NotAnAdapter,
    Reason,
    RefusedByVLLM,
    StoreDamaged,
)
from s3lora_serve.policy import Limits
from s3lora_serve.served_gauge import OTHER
from s3lora_serve.settings import load_settings
from s3lora_serve.store import Kept, servable
from s3lora_serve.verdict import Verdict
from s3lora_serve.vllm_plugin import compat, served_model
from s3lora_serve.vllm_plugin.desk import Desk, Refused, remember
from s3lora_serve.vllm_plugin.fit import check_loaded, fitted_names, load_copy, remove_unscorable
from s3lora_serve.vllm_plugin.offline import OfflineDoor
from s3lora_serve.vllm_plugin.recorder import unknown
from s3lora_serve.vllm_plugin.registrar import Registrar, door

logger = compat.logger

CHECKED = Limits(max_scaling=None, max_rank=2**31, max_bytes=2**62)
"""For content that its digest shows to be what was admitted, under the limits of that day."""

_guard: "Guard | None" = None


def install() -> None:
    """Guard this process, whichever of vLLM's processes it is, once.

    Raises:
        S3LoRAError: the policy, the environment or vLLM's contract is not as it must be.
    """
    global _guard
    if _guard is not None:
        return
    desk = Desk(load_settings())
    compat.check_contract()
    guard = Guard(desk)
    compat.after_create_lora_manager(guard.activate)
    for name in ("status", "model", "refusal", "holds", "refresh"):
        compat.add_worker_method(f"s3lora_{name}", _asked(guard, name))
    if desk.policy.mode != "off":
        desk.store.prepare()
        compat.tell_requests_apart()
        compat.wrap_load_adapter(guard.load)
        compat.wrap_add_adapter(guard.add)
        compat.around_registration(guard.registration)
        compat.wrap_add_lora(guard.registrar.add_lora)
        compat.wrap_add_request(OfflineDoor(desk).admitted)
        compat.wrap_doors(door)
        compat.wrap_unload(guard.registrar.served.remove)
        compat.mark_blocks(guard.is_quarantined)
    _guard = guard


def registrar() -> Registrar | None:
    """The registrar of this process, if the gate is installed and not off."""
    return _guard.registrar if _guard and _guard.desk.policy.mode != "off" else None


def _asked(guard: "Guard", name: str) -> Callable[..., Any]:
    return lambda _worker, *args: getattr(guard, name)(*args)


class Guard:
    """The gate of one worker process."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.registrar = Registrar(desk)
        self._active = False
        self._places: set[tuple[str, str]] = set()
        self._shapes: set[tuple[int, int]] = set()
        self._whole = False
        self._base_model: str | None = None
        self._registering = False
        self._refusals: OrderedDict[int, Reason] = OrderedDict()
        self._origins: OrderedDict[tuple[int, str], Path] = OrderedDict()
        self._held: OrderedDict[int, str] = OrderedDict()

    def activate(self, manager: Any, vllm_config: Any) -> None:
        """A worker has its LoRA modules: learn their names and say that the gate is up."""
        self._base_model = compat.base_model(vllm_config)
        self._whole = served_model.holds_whole_model(manager)
        shapes = served_model.module_shapes(manager)
        self._places, self._shapes = _places(shapes), set(shapes.values())
        self._active = self.desk.policy.mode != "off"
        self.desk.recorder.metrics.know_model(self._places)
        self._show_policy()

    def _show_policy(self) -> None:
        policy, release = self.desk.policy, version("s3lora-serve")
        self.desk.recorder.metrics.activate(policy.digest, policy.mode, release)
        logger.info("s3lora %s: gate in mode %s, policy %s", release, policy.mode, policy.digest)

    def refresh(self) -> None:
        """Take up a policy file that has changed."""
        self.desk.refresh()
        self._show_policy()

    def status(self) -> dict[str, Any]:
        """What this worker says when asked whether it is guarded."""
        return {"active": self._active}

    def model(self) -> dict[str, list[tuple[Any, Any]]]:
        """(layer, projection) and (m, n) of the modules of this worker's part of the model."""
        return {"places": sorted(self._places), "shapes": sorted(self._shapes)}

    def refusal(self, adapter_id: int) -> tuple[str, str] | None:
        """Code and message of why this worker holds the adapter without effect, if it does."""
        reason = self._refusals.get(adapter_id)
        return (reason.code, reason.message) if reason else None

    def holds(self, adapter_id: int) -> str | None:
        """The digest of content and ruling that this worker loaded under an id."""
        return self._held.get(adapter_id)

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
        verdict: Verdict | None = None
        try:
            kept = self._kept(request)
            verdict = kept.verdict
            started = time.perf_counter()
            lora = self._enforced(manager, request, original, kept)
        except AdapterRejected as refusal:
            return self._quarantined(request, _reason(refusal, verdict), verdict)
        except Exception as error:
            logger.exception("s3lora: adapter %r", request.lora_name)
            failed = GateFailed(f"{type(error).__name__}: {error}")
            return self._quarantined(request, Reason.of(failed), verdict)
        if compat.is_first_rank():
            if self._registering:
                self.desk.recorder.metrics.observe_strip(time.perf_counter() - started)
            elif self._held.get(adapter_id) == kept.path.name:
                self.desk.recorder.reloaded(replace(kept.verdict, name=request.lora_name), "store")
        self._refusals.pop(adapter_id, None)
        remember(self._held, adapter_id, kept.path.name)
        return lora

    def add(self, manager: Any, request: Any, original: Callable[..., bool]) -> bool:
        """Add an adapter to the engine in the place of `add_adapter`, never half.

        vLLM marks an adapter active before it fills its slot: whatever goes wrong in between would
        leave later modules with the slot's last tenant.
        """
        held = self._held.get(request.lora_int_id)
        expected = self._expected(request)
        if held and expected and (held != expected.name or self.is_quarantined(str(expected))):
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
        shapes = self._shapes if self._whole else ()
        verdict, path = self.desk.decide(
            folder, request.lora_name, self._base_model, shapes, keep_refused=True
        )
        if path is None:
            raise Refused(str(verdict.reason))
        passing = verdict.reason and verdict.reason.code.startswith("S3LORA-4")
        if verdict.digest and not passing:
            # Ranks score for themselves; should they differ, the first to be done rules for all.
            content = (verdict.digest, verdict.config_digest, verdict.policy_digest)
            model = (self._base_model, sorted(self._shapes) if self._whole else None)
            name = (version("s3lora-serve"), request.lora_name, str(folder))
            facts = (*name, *model, *content)
            path = self.desk.store.agree(repr(facts), path)
        if compat.is_first_rank():
            self.desk.recorder.decided(verdict, "engine")
        return path

    def _enforced(
        self, manager: Any, request: Any, original: Callable[..., Any], kept: Kept
    ) -> Any:
        """The LoRAModel that vLLM may take."""
        verdict = kept.verdict
        if kept.copy is None:
            raise Refused(str(verdict.reason))
        passed = "strip" if verdict.removed else "admit" if verdict.unscored else "reject"
        adapter = read_adapter(kept.copy, CHECKED, passed)
        served = fitted_names(manager, adapter)
        lora = load_copy(manager, compat.with_path(request, kept.path), original)
        check_loaded(lora, served, adapter)
        if verdict.mode == "enforce":
            for name in verdict.stripped:
                served_model.strip_module(lora, served[name])
            remove_unscorable(lora, served, verdict.removed)
        if not lora.loras:
            served_model.make_inert(lora)
        return lora

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


def _reason(refusal: AdapterRejected, verdict: Verdict | None) -> Reason:
    """The reason of a refusal; one that was decided before is the verdict's own."""
    if isinstance(refusal, Refused) and verdict and verdict.reason:
        return verdict.reason
    return Reason.of(refusal)


def _places(names: Iterable[str]) -> set[tuple[str, str]]:
    """(layer, projection) of the base model's modules."""
    places = set()
    for name in names:
        parts = name.split(".")
        layer = next((part for part in parts if part.isdecimal()), OTHER)
        places.add((layer, parts[-1]))
    return places
