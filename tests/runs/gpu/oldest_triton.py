"""The oldest Triton that the kernels are compiled with: the oldest CUDA PyTorch asks for it."""

import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "3.6.0"
"""PyTorch 2.11 asks for it, which vLLM 0.26 to 0.32 may run on."""

FOLDER = Path(__file__).parents[3] / ".compat" / f"triton-{VERSION}"


def oldest_triton() -> Path:
    """The folder that has it, to be put first on the path; pip installs it there once.

    Raises:
        CalledProcessError: pip cannot.
    """
    if not FOLDER.exists():
        half = FOLDER.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        command = ["pip", "install", "--quiet", "--no-deps", "--target", half, f"triton=={VERSION}"]
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
        half.rename(FOLDER)
    return FOLDER
