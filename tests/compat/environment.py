"""One virtual environment per version of vLLM, made once and kept until its pins change."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.compat.pins import ROOT, requirements

FOLDER = ROOT / ".compat"


def python_of(version: str) -> Path:
    """The interpreter of this version's environment, which is made where it is missing."""
    folder = FOLDER / version
    python = folder / "bin" / "python"
    made_of = folder / "requirements.txt"  # written last: without it the environment is half made
    wanted = requirements(version)
    if not made_of.exists() or made_of.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        asked = folder / "asked.txt"
        asked.write_text(wanted)
        # As in the Makefile: --no-deps leaves out what would not load beside a CPU torch.
        install(python, "-r", str(asked))
        asked.rename(made_of)
    # Each time: the entry points, by which vLLM finds the plugin, may be others than last time.
    install(python, "--no-build-isolation", "-e", str(ROOT))
    return python


def install(python: Path, *what: str) -> None:
    """Install exactly this and nothing that it asks for."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *what], check=True)


def installed(python: Path, names: list[str]) -> dict[str, str]:
    """The versions of these packages in that environment, as it says itself."""
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
    """This process's environment without what would lead Python to another environment."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in foreign}
