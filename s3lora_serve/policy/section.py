"""The base of the policy's parts: unknown keys are refused, and nothing changes after reading."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
