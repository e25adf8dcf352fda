"""Settings from `S3LORA_` environment variables. The error for a bad value names its variable."""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from s3lora_serve.errors import SettingInvalid

Mode = Literal["enforce", "audit", "off"]
Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseSettings):
    """The values of the environment variables. The docs/reference.md lists every variable."""

    model_config = SettingsConfigDict(env_prefix="S3LORA_", frozen=True)

    policy: Path | None = Field(None, description="policy file; unset: the built-in default")
    mode: Mode | None = Field(None, description="overrides the policy's mode")
    device: Device = Field("auto", description="where modules are scored")
    state_dir: Path = Field(
        Path(tempfile.gettempdir()),
        description="parent of the user-only folder that holds private and stored copies",
    )
    skip_stripped: bool = Field(
        True, description="skip the operations of modules without weights where possible"
    )
    skip_captured: bool = Field(
        False, description="skip them in compiled models and captured graphs too; not measured yet"
    )
    audit_log: Path | None = Field(None, description="overrides the policy's audit.path")
    plans: Path | None = Field(None, description="overrides the policy's plans")


def load_settings() -> Settings:
    """Read the environment variables.

    Raises:
        SettingInvalid: a variable has a value that is not allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"S3LORA_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()
        ]
        raise SettingInvalid("; ".join(problems)) from None
