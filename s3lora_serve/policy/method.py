"""The parts of the policy on how an adapter is scored and changed."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from s3lora_serve.policy.section import Digest, Fraction, Section
from s3lora_serve.scorer_names import ALIGNMENT, MAS_SVD, AnyScorer

Normalization = Literal["two_sided", "row", "column", "equilibrated"]
Action = Literal["strip", "project"]


class ScorerChoice(Section):
    """The index, with all parameters that influence it."""

    name: AnyScorer = MAS_SVD
    """A server takes the first three. `safe-lora` and `splora` compare with what alignment changed
    in the base model ([alignment](alignment.md))."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """M, the singular values that count; null: min(r, m, n)."""
    normalization: Normalization = "two_sided"
    """Which norms the singular values are weighed by: of rows, of columns, or of both."""
    reference: Path | None = None
    """A file of `s3lora reference make`, for `safe-lora` and `splora`."""
    reference_digest: Digest | None = None
    """Of that file; null: as it is when the policy is read."""

    @model_validator(mode="after")
    def _reference_where_it_is_used(self) -> Self:
        if self.by_alignment and self.reference is None:
            raise ValueError(f"{self.name} needs reference: a file of `s3lora reference make`")
        if self.reference is None and self.reference_digest is not None:
            raise ValueError("reference_digest is the digest of reference, which is not set")
        return self

    @property
    def by_alignment(self) -> bool:
        """Whether modules are compared with what alignment changed in the base model."""
        return self.name in ALIGNMENT

    def as_json(self) -> dict[str, Any]:
        """Name and parameters, in the form used in verdicts."""
        unused = {"name"} if self.by_alignment else {"name", "reference", "reference_digest"}
        return {"name": self.name, "parameters": self.model_dump(mode="json", exclude=unused)}


class RepairChoice(Section):
    """Repair at admission: the update acts little on refusals, and on benign inputs as before."""

    statistics: Path
    """A file of `s3lora statistics make`."""
    statistics_digest: Digest | None = None
    """Of that file; null: as it is when the policy is read."""
    strength: Annotated[float, Field(gt=0, le=1e6)] = 1.0  # ours: sweep of the evidence bench
    """λ, what benign inputs weigh against refusals."""
    max_effect: Annotated[float, Field(gt=0, le=1)] = 0.003  # ours: the same sweep
    """Largest effect on refusals that is left, against what the base model's own weights put out: λ
    is smaller if more were."""
    on_missing: Literal["reject", "leave"] = "reject"
    """`leave` serves modules that the statistics lack as they are."""


class Strip(Section):
    """The rule that picks the modules to strip: exactly one of the four."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    """The sharpest modules, so many."""
    fraction: Fraction | None = None
    """The sharpest modules, so large a share of all."""
    threshold: float | None = None
    """SSI at or above, alignment score at or below; in [0, 1], except for `splora`."""
    outliers: Annotated[float, Field(gt=0)] | None = None
    """Robust z-score at or above: 3.5 is usual."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.rule[1] is None:
            raise ValueError("expected exactly one of top_k, fraction, threshold, outliers")
        return self

    @property
    def rule(self) -> tuple[str, float]:
        """The chosen rule's name and its value."""
        [name] = self.model_fields_set
        return name, getattr(self, name)
