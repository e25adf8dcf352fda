"""One virtual environment per version of vLLM, created once and reused until its pins change."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.runs.compat.pins import ROOT, requirements

FOLDER = ROOT / ".compat"


def python_of(version: str) -> Path:
    """The interpreter of this version's environment, which is created if missing."""
    folder = FOLDER / version
    python = folder / "bin" / "python"
    installed_pins = folder / "requirements.txt"  # written last: it marks a complete environment
    pins = requirements(version)
    if not installed_pins.exists() or installed_pins.read_text() != pins:
        venv.create(folder, clear=True, with_pip=True)
        requested = folder / "asked.txt"
        requested.write_text(pins)
        # As in the Makefile: --no-deps omits packages that do not load beside a CPU torch.
        install(python, "-r", str(requested))
        requested.rename(installed_pins)
    # Each time: the entry points, by which vLLM finds the plugin, may have changed.
    install(python, "--no-build-isolation", "-e", str(ROOT))
    return python


def install(python: Path, *what: str) -> None:
    """Install exactly these packages, without their dependencies."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *what], check=True)


def installed(python: Path, names: list[str]) -> dict[str, str]:
    """The versions of these packages as that environment reports them."""
    program = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", program, *names], check=True, capture_output=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def wheel_of(distribution: str, version: str) -> Path:
    """The wheel of a version that cannot be installed here, downloaded once."""
    folder = FOLDER / "wheels"
    stem = f"{distribution.replace('-', '_')}-{version}-"
    if not (found := list(folder.glob(f"{stem}*.whl"))):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, f"{distribution}=={version}"], cwd=folder, check=True)
        found = list(folder.glob(f"{stem}*.whl"))
    return found[0]


def clean_variables() -> dict[str, str]:
    """This process's environment without variables that select another Python environment."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in foreign}
