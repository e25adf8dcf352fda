"""The base of the policy's parts: unknown keys are refused, and nothing changes after reading."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Section(BaseModel):
    """A mapping of the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
