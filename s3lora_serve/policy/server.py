"""The parts of the policy that are the server's, and no single adapter's."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from s3lora_serve.policy.globs import GlobText, glob_matches
from s3lora_serve.policy.section import Section


class Audit(Section):
    """The audit log of decisions."""

    path: Path | None = None
    """Null: there is none."""
    max_bytes: Annotated[int, Field(gt=0)] = 100 * 2**20  # decisions of one day on a busy server
    """Of one file; then a new one begins."""
    keep: Annotated[int, Field(ge=0)] = 5
    """Former files that are kept."""
    required: bool = False
    """An adapter is refused if its decision cannot be written (S3LORA-404)."""


class Store(Section):
    """The limit on the stored copies on disk."""

    max_bytes: Annotated[int, Field(gt=0)] = 20 * 2**30  # ten adapters of the largest size
    """The least recently used copies are evicted, never a served one."""


class Rates(Section):
    """How often each tenant may ask for loads, and be refused. None: as often as it likes."""

    loads_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of each tenant, below; 60 suits most servers."""
    refusals_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Likewise; 10 suits most servers."""


class ExperimentsPolicy(Section):
    """Registrations with settings of their own, which `s3lora evaluate` asks for."""

    names: GlobText = "eval/*"  # ours
    """Glob of the names that are kept for experiments; `*` does not cross `/`."""
    allow: frozenset[Literal["strip", "scorer", "action", "plan", "repair"]] = frozenset()
    """What an experiment may set."""
    ttl: Annotated[float, Field(gt=0)] | None = None
    """Seconds that one runs; null: until it is ended."""

    def claims(self, name: str) -> bool:
        """Whether a name is kept for experiments."""
        return glob_matches(self.names, name)
