"""The result of one check of the environment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check; the environment is guarded if all essential checks pass."""

    name: str
    passed: bool
    detail: str
    essential: bool = True  # if it fails, `serve` does not start

    @property
    def guards(self) -> bool:
        """Whether a server that fails this check is unguarded, on purpose or not."""
        return self.essential or self.name == "policy"
