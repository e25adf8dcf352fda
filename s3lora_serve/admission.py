"""Admission: read, score and rule on one adapter from its private copy. One path for every door."""

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from s3lora_serve.adapter import Adapter, Module, read_adapter
from s3lora_serve.errors import (
    AdapterRejected,
    Cancels,
    DeadlinePassed,
    DoesNotFitModel,
    GateFailed,
    NotFinite,
    NothingSelected,
    Reason,
)
from s3lora_serve.gate import Ruling, rule
from s3lora_serve.intake import PrivateCopy, check_roots, copy_adapter
from s3lora_serve.policy import Policy
from s3lora_serve.selection import energy_shares, negligible_modules
from s3lora_serve.spectral import Factors, ModuleScore, Scorer, score_modules
from s3lora_serve.storage import StoredFolder
from s3lora_serve.verdict import Decision, ModuleVerdict, Seconds, Verdict

MOST_CANCELLATION = 1e3
"""Largest ‖B‖·‖A‖/‖B·A‖ scored. Trained factors have about √r; from 2^8 on, products rounded to
bfloat16 err by as much as the product itself, and the index describes something never served."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A verdict, and the adapter it is about unless it could not be read."""

    verdict: Verdict
    adapter: Adapter | None
    refusal: AdapterRejected | None
    scores: tuple[ModuleScore, ...] = ()

    def under(self, policy: Policy) -> Verdict:
        """The verdict on the same scores, had `policy` been the one for this adapter."""
        if self.adapter is None or not self.scores or not self.verdict.digest:
            return self.verdict
        ruling = rule(self.scores, _scaling(self.adapter), self.verdict.digest, policy)
        return replace(
            self.verdict,
            decision=ruling.decision,
            reason=Reason.of(ruling.refusal) if ruling.refusal else None,
            uninformative=ruling.uninformative,
            policy_digest=policy.digest,
            modules=_module_verdicts(self.adapter, self.scores, ruling, policy),
        )


def admit(
    folder: Path | StoredFolder,
    name: str,
    policy: Policy,
    *,
    base_model: str | None = None,
    device: str = "auto",
    into: Callable[[], Path] | None = None,
    shapes: Collection[tuple[int, int]] = (),
    origin: Path | None = None,
) -> Admission:
    """Take a private copy of the adapter and decide on it; a bad adapter is a rejected verdict.

    `policy` is the server's; its rules are applied here. `into` makes the folder for the
    copy, which is in memory if None. Where `shapes` of the served model's modules are known, others
    are refused before any of them costs time or memory. `origin` is where the adapter came from,
    which rules match and the verdict names, if it no longer lies there.
    """
    started = time.perf_counter()
    where = origin or folder
    real = _real_path(where) if isinstance(where, Path) else str(where)
    effective = policy.for_adapter(name, real, base_model)
    deadline = started + effective.limits.seconds
    copy: PrivateCopy | None = None
    adapter: Adapter | None = None
    scores: list[ModuleScore] = []
    read = scored = started
    try:
        limits = effective.limits
        if origin is not None:
            check_roots(Path(real), limits.roots)
            limits = limits.model_copy(update={"roots": ()})
        if isinstance(folder, StoredFolder):
            copy = folder.copy(limits)
            deadline = time.perf_counter() + limits.seconds  # downloads have their own
        else:
            copy = copy_adapter(folder, limits, into() if into else None)
        check = partial(_check_deadline, deadline, effective)
        check()
        adapter = read_adapter(copy, effective.limits, effective.on_unscorable, check)
        _check_shapes(adapter, shapes)
        read = time.perf_counter()
        scores = _score(adapter, effective, device, check)
        scored = time.perf_counter()
        ruling = rule(scores, _scaling(adapter), copy.digest, effective)
    except AdapterRejected as refusal:
        ruling = Ruling(Decision.REJECTED, refusal)
    except Exception as error:  # noqa: BLE001 - fail closed: whatever broke, nothing unscored is admitted
        ruling = Ruling(Decision.REJECTED, GateFailed(f"{type(error).__name__}: {error}"))
    ended = time.perf_counter()
    unscorable = adapter.unscorable if adapter else ()
    verdict = Verdict(
        path=str(where),
        name=name,
        digest=copy.digest if copy else None,
        config_digest=adapter.config.digest if adapter else None,
        decision=ruling.decision,
        reason=Reason.of(ruling.refusal) if ruling.refusal else None,
        uninformative=ruling.uninformative,
        mode=policy.mode,
        scorer={
            "name": effective.scorer.name,
            "parameters": effective.scorer.model_dump(exclude={"name"}),
        },
        policy_digest=policy.digest,
        modules=_module_verdicts(adapter, scores, ruling, effective) if adapter and scores else (),
        removed=unscorable if effective.on_unscorable == "strip" else (),
        unscored=unscorable if effective.on_unscorable == "admit" else (),
        seconds=Seconds(max(read - started, 0), max(scored - read, 0), ended - started),
    )
    return Admission(verdict, adapter, ruling.refusal, tuple(scores))


def _scaling(adapter: Adapter) -> dict[str, float]:
    return {module.name: module.scaling for module in adapter.modules}


def _check_shapes(adapter: Adapter, shapes: Collection[tuple[int, int]]) -> None:
    for module in adapter.modules:
        if shapes and module.shape not in shapes:
            raise DoesNotFitModel(
                f"module {module.name} updates a {module.shape[0]} x {module.shape[1]} matrix, and"
                " the served model has no such LoRA module"
            )


def _real_path(folder: Path) -> str:
    """The path without links and dots, for rules to match; copying says what is wrong with it."""
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):  # a null byte
        return str(folder)


def _check_deadline(deadline: float, policy: Policy) -> None:
    if time.perf_counter() > deadline:
        raise DeadlinePassed(f"reading and scoring took over {policy.limits.seconds:g} s")


def _score(
    adapter: Adapter, policy: Policy, device: str, check_deadline: Callable[[], None]
) -> list[ModuleScore]:
    """Score the selected modules, check the others for NaN, within the deadline."""
    chosen = {module.name: policy.selects(module.name) for module in adapter.modules}
    selected = [module for module in adapter.modules if chosen[module.name]]
    factors = [Factors(m.name, _as_served(m.B), _as_served(m.A), m.scaling) for m in selected]
    scorer = Scorer(**policy.scorer.model_dump())
    scores = score_modules(factors, scorer, device=device, between_batches=check_deadline)
    broken = [score.name for score in scores if not score.finite]
    for module in adapter.modules:
        if not chosen[module.name]:
            check_deadline()
            broken += [] if _is_finite(module) else [module.name]
    if broken:
        raise NotFinite(f"module {broken[0]} holds NaN or Inf as served (of {len(broken)} that do)")
    for score in scores:
        if not score.cancellation <= MOST_CANCELLATION:
            raise Cancels(
                f"module {score.name} has factors {score.cancellation:.1e} times its product"
            )
    if not scores:
        raise NothingSelected(
            f"the policy's modules {list(policy.modules)} match none of its modules"
        )
    return scores


def _as_served(factor: Tensor) -> Tensor:
    """A factor in no more than float32: no server's LoRA weights are wider.

    What float32 cannot hold is served as zero or infinity, and is scored as that.
    """
    return factor.float() if factor.dtype == torch.float64 else factor


def _is_finite(module: Module) -> bool:
    return all(_as_served(factor).isfinite().all() for factor in (module.A, module.B))


def _module_verdicts(
    adapter: Adapter, scores: Sequence[ModuleScore], ruling: Ruling, policy: Policy
) -> tuple[ModuleVerdict, ...]:
    shares = energy_shares(scores)
    scored = {score.name: (score, share) for score, share in zip(scores, shares, strict=True)}
    negligible = negligible_modules(scores, policy.negligible)
    return tuple(
        _module_verdict(
            module,
            *scored.get(module.name, (None, None)),
            stripped=module.name in ruling.stripped,
            negligible=module.name in negligible,
        )
        for module in adapter.modules
    )


def _module_verdict(
    module: Module,
    score: ModuleScore | None,
    energy_share: float | None,
    *,
    stripped: bool,
    negligible: bool,
) -> ModuleVerdict:
    return ModuleVerdict(
        name=module.name,
        layer=module.layer,
        projection=module.projection,
        shape=module.shape,
        rank=module.rank,
        ssi=score.ssi if score else None,
        relative_ssi=score.relative_ssi if score else None,
        spectrum=score.spectrum if score else (),
        row_norm_mean=score.row_norm_mean if score else None,
        column_norm_mean=score.column_norm_mean if score else None,
        stripped=stripped,
        energy_share=energy_share,
        negligible=negligible,
    )
