"""The parts of the policy on what is read and admitted at all."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from s3lora_serve.policy.section import Digest, Fraction, Section


class Limits(Section):
    """Bounds on what is read and admitted."""

    max_stripped_fraction: Fraction = 0.5  # ours: with more stripped, it is another adapter
    max_scaling: Annotated[float, Field(gt=0)] | None = 64  # ours: alpha 64 at r = 1
    max_norm_ratio: Annotated[float, Field(gt=0)] | None = None
    seconds: Annotated[float, Field(gt=0)] = 30  # far above any measured admission
    download_seconds: Annotated[float, Field(gt=0)] = 600  # hub ids, URLs: the largest at 4 MB/s
    load_seconds: Annotated[float, Field(gt=0)] = 120  # in workers; ours: max_bytes at 20 MB/s
    max_bytes: Annotated[int, Field(gt=0)] = 2 * 2**30  # r = 64 on a 70B model is 1.7 GB in bf16
    negative_alpha: bool = False  # ours: it takes away what was trained
    min_rank: Annotated[int, Field(ge=1)] = 1  # 2 refuses rank-1 modules, which cannot be ranked
    max_rank: Annotated[int, Field(ge=1)] = 256  # the largest in common use; vLLM allows up to 512
    formats: tuple[Literal["safetensors"], ...] = ("safetensors",)  # other formats run code to load
    roots: tuple[Path, ...] = ()


class Allowed(Section):
    """One adapter by its contents: weights and configuration, as verdicts name them."""

    digest: Digest
    config_digest: Digest

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
