"""The parts of the policy on what is read and admitted at all."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from s3lora_serve.policy.section import Digest, Fraction, Section


class Limits(Section):
    """Bounds on what is read and admitted."""

    max_stripped_fraction: Fraction = 0.5  # ours: with more stripped, it is another adapter
    """`top_k` and `fraction` stop there; `threshold` and `outliers` beyond it refuse the adapter. A
    plan is not bound by it."""
    max_scaling: Annotated[float, Field(gt=0)] | None = 64  # ours: alpha 64 at r = 1
    """alpha / r; the index does not depend on it."""
    max_norm_ratio: Annotated[float, Field(gt=0)] | None = None
    """‖ΔW‖_F of a module over the adapter's median; null: no limit."""
    seconds: Annotated[float, Field(gt=0)] = 30  # far above any measured admission
    """Deadline of a decision, checked between batches of modules."""
    download_seconds: Annotated[float, Field(gt=0)] = 600  # the largest adapter at 4 MB/s
    """For hub ids and URLs."""
    load_seconds: Annotated[float, Field(gt=0)] = 120  # ours: max_bytes at 20 MB/s
    """For the workers to read a stored copy."""
    max_bytes: Annotated[int, Field(gt=0)] = 2 * 2**30  # r = 64 on a 70B model is 1.7 GB in bf16
    """Size of the weights file."""
    negative_alpha: bool = False  # ours: it takes away what was trained
    """Whether an alpha below 0 is admitted where `allow` does not list the adapter (S3LORA-223)."""
    min_rank: Annotated[int, Field(ge=1)] = 1
    """2 refuses rank-1 modules, which cannot be ranked."""
    max_rank: Annotated[int, Field(ge=1)] = 256  # the largest in common use
    """vLLM itself allows up to 512."""
    formats: tuple[Literal["safetensors"], ...] = ("safetensors",)
    """Other formats run code when they are loaded."""
    roots: tuple[Path, ...] = ()
    """If set, an adapter's folder and files must lie under these, links resolved."""


class Allowed(Section):
    """One adapter by its contents: weights and configuration, as verdicts name them."""

    digest: Digest
    """Of the weights file."""
    config_digest: Digest
    """Of the configuration."""

    @model_validator(mode="before")
    @classmethod
    def _weights_and_configuration(cls, data: object) -> object:
        if isinstance(data, str):
            raise ValueError(
                "a digest alone would admit the weights under any configuration, which scales"
                " them: list {digest: sha256:…, config_digest: sha256:…}, both from the adapter's"
                " verdict (s3lora scan --format json)"
            )
        return data
