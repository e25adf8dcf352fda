"""The packages that hold the base model and the prompts, unpacked in the bench's cache."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(".evidence")
"""Everything that the bench makes, beside the checkout's other caches; git ignores it."""

PINS = Path(__file__).with_name("wheels.txt")


def unpacked() -> Path:
    """The folder with the unpacked wheels of these pins; they are downloaded once."""
    folder = CACHE / f"wheels-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:8]}"
    if not folder.exists():
        downloads = CACHE / "downloads"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(downloads), "-r", str(PINS)], check=True)
        staging = folder.with_suffix(".part")
        for wheel in sorted(downloads.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(staging)
        staging.rename(folder)
    return folder
