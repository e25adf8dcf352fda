"""Programs from the npm registry that tests use, with pinned versions."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHROMIUM = "@sparticuz/chromium@153.0.0"
"""A headless Chromium with its libraries and fonts, for x86-64."""

MULTITOOL = "@microsoft/sarif-multitool@5.7.0"
"""Microsoft's SARIF validator: checks the schema, its own rules and GitHub's rules."""

FOLDER = Path(sys.prefix) / "npm"
"""Beside the pinned Python packages: `make clean` removes it with them."""


def installed(package: str) -> Path:
    """The folder of an installed package; the first call installs it from the registry.

    Skips the calling test if npm is missing or cannot reach its registry.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"needs npm, for {package} (Debian: npm)")
    folder = FOLDER / package.strip("@").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several test processes may install at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            command = [npm, "install", "--prefix", str(folder), "--no-fund", "--no-audit"]
            done = subprocess.run(
                [*command, package],
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            if done.returncode:
                why = [line for line in done.stderr.splitlines() if "error" in line]
                pytest.skip(f"npm cannot install {package}: {' '.join(why)[:300]}")
            (folder / "ready").touch()
    return folder
