"""A headless Chromium for tests of pages: the npm package's, else the one on this machine."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import npm

UNPACK = """
import chromium from "@sparticuz/chromium";
console.log(await chromium.executablePath());
"""
LIBRARIES = "AWS_Lambda_nodejs22.x"
"""The package unpacks the libraries beside the browser only in this AWS Lambda environment."""


FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{0}/fonts</dir><cachedir>{0}/cache</cachedir></fontconfig>
"""
"""The package's own font configuration points to folders of AWS Lambda."""


@dataclass(frozen=True)
class Browser:
    """A program and the environment variables that it needs."""

    program: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def runs(self) -> bool:
        """Whether it starts on this machine."""
        command = [self.program, "--version"]
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, check=False
        )
        return done.returncode == 0


def chromium() -> Browser:
    """The npm package's browser if it runs, else this machine's; skips the test if neither."""
    system = shutil.which("chromium")
    try:
        browser = unpacked(npm.installed(npm.CHROMIUM))
    except pytest.skip.Exception:
        if system is None:
            raise
        return Browser(system)
    if browser.runs():
        return browser
    if system is None:
        pytest.skip(f"{npm.CHROMIUM} does not run here; needs Chromium (Debian: chromium)")
    return Browser(system)


def unpacked(package: Path) -> Browser:
    """The browser of the installed npm package, unpacked into a folder of the package."""
    folder = package / "unpacked"
    folder.mkdir(exist_ok=True)
    script = package / "unpack.mjs"
    script.write_text(UNPACK)
    environment = os.environ | {"TMPDIR": str(folder), "AWS_EXECUTION_ENV": LIBRARIES}
    done = subprocess.run(
        ["node", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    libraries = {"LD_LIBRARY_PATH": str(folder / "al2023" / "lib")}
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS.format(folder))
    return Browser(done.stdout.strip(), libraries | {"FONTCONFIG_FILE": str(fonts)})


FOLDER = r"/\S*/pytest-of-\w+/pytest-\d+(/popen-\w+)?/\w+"
"""The folder of a test run, which documents show as /adapters."""

HIDE_FOLDER = """folder => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode())
    texts.currentNode.data = texts.currentNode.data.replace(RegExp(folder, "g"), "/adapters");
}"""


def save_screenshot(page: Any, name: str, *, whole: bool = True) -> None:
    """Save a screenshot for docs/ if the variable SCREENSHOTS names a folder.

    Without `whole` it shows what is seen before one scrolls.
    """
    if folder := os.environ.get("SCREENSHOTS"):
        page.evaluate(HIDE_FOLDER, FOLDER)
        page.screenshot(path=f"{folder}/{name}", full_page=whole)
