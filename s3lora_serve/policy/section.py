"""The base of the policy's parts: unknown keys are refused, and nothing changes after reading.

The string under a field says what it means, and is its row in `docs/reference.md`. Comments on the
defaults give their origin; "ours" means that this project chose the value.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Section(BaseModel):
    """A mapping of the policy."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
