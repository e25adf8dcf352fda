"""Score an adapter's selected modules, and check that the scores are valid."""

from collections.abc import Callable, Sequence

from s3lora_serve.adapter.reader import MAX_CANCELLATION, Adapter, Module, as_served
from s3lora_serve.adapter.tensor_file import check_owner
from s3lora_serve.alignment.reference_file import Reference, loaded_reference
from s3lora_serve.errors import (
    Cancels,
    NotFinite,
    NothingSelected,
    PolicyInvalid,
    ReferenceInvalid,
    ReferenceUnfit,
)
from s3lora_serve.policy.schema import Policy
from s3lora_serve.signatures.attestation import Attestation
from s3lora_serve.spectral import Factors, ModuleScore, Scorer, Subspace, score_modules


def score_adapter(
    adapter: Adapter, policy: Policy, device: str, check_deadline: Callable[[], None]
) -> list[ModuleScore]:
    """Score the modules that the policy selects; check the others for NaN and Inf.

    `check_deadline` runs between batches and may raise to stop.

    Raises:
        NotFinite: a factor holds NaN or Inf.
        Cancels: the factors of a module exceed their product by more than MAX_CANCELLATION.
        NothingSelected: the policy selects no module.
        ReferenceUnfit: the policy's reference lacks a module, or has it in another shape.
        ReferenceInvalid: the reference cannot be used.
    """
    selected = {module.name for module in adapter.modules if policy.selects(module.name)}
    factors = [
        Factors(m.name, as_served(m.B), as_served(m.A), m.scaling)
        for m in adapter.modules
        if m.name in selected
    ]
    choice = policy.scorer
    scorer = Scorer(choice.name, choice.rank, choice.normalization)
    reference = alignment_reference(policy)
    subspaces = _subspaces(reference, factors) if reference else ()
    scores = score_modules(
        factors, scorer, device=device, between_batches=check_deadline, subspaces=subspaces
    )
    not_finite = [score.name for score in scores if not score.finite]
    for module in adapter.modules:
        if module.name not in selected:
            check_deadline()
            not_finite += [] if _is_finite(module) else [module.name]
    if not_finite:
        raise NotFinite(
            f"module {not_finite[0]} holds NaN or Inf as served (of {len(not_finite)} that do)"
        )
    for score in scores:
        if not score.cancellation <= MAX_CANCELLATION:
            raise Cancels(
                f"module {score.name} has factors {score.cancellation:.1e} times its product"
            )
    if not scores:
        raise NothingSelected(
            f"the policy's modules {list(policy.modules)} match none of its modules"
        )
    return scores


def attested_scores(
    adapter: Adapter, policy: Policy, attested: Attestation | None
) -> list[ModuleScore] | None:
    """The scores of an attestation whose scores the policy trusts.

    None: there is none, or its scores are of other modules than the policy selects.
    """
    if attested is None or not policy.attestations.trust_scores:
        return None
    selected = [module.name for module in adapter.modules if policy.selects(module.name)]
    scores = {score.name: score for score in attested.statement.predicate.scores}
    if not selected or sorted(scores) != sorted(selected):
        return None
    return [ModuleScore(finite=True, **scores[name].model_dump()) for name in selected]


def alignment_reference(policy: Policy) -> Reference | None:
    """The reference that the policy's scorer compares with; None if the scorer needs none.

    Raises:
        ReferenceInvalid: it cannot be read, or is not the file that was there with the policy.
    """
    choice = policy.scorer
    if not choice.by_alignment or choice.reference is None:
        return None
    return loaded_reference(choice.reference, choice.reference_digest or "")


def check_reference(policy: Policy) -> None:
    """Read the policy's alignment reference, if it has one, and check who can write it.

    Raises:
        PolicyInvalid: it is not valid, or others than this user and root can write it.
    """
    if policy.mode == "off" or not policy.scorer.reference:
        return
    try:
        check_owner(policy.scorer.reference)
        alignment_reference(policy)
    except ValueError as error:
        raise PolicyInvalid(f"scorer.reference: {error}") from None
    except ReferenceInvalid as error:
        raise PolicyInvalid(f"scorer.reference: {error.problem}") from None


def _subspaces(reference: Reference, factors: Sequence[Factors]) -> list[Subspace]:
    for module in factors:
        shape = (len(module.B), module.A.shape[1])
        record = reference.about.modules.get(module.name)
        if record is None or record.shape != shape:
            held = f"as {record.shape[0]} x {record.shape[1]}" if record else "not at all"
            raise ReferenceUnfit(
                f"module {module.name} updates a {shape[0]} x {shape[1]} matrix, which the"
                f" reference holds {held}"
            )
    return [reference.subspaces[module.name] for module in factors]


def _is_finite(module: Module) -> bool:
    return all(as_served(factor).isfinite().all() for factor in (module.A, module.B))
