"""`python -m tests.runs.compat.source_contract WHEEL`: check the contract on the source of a vLLM.

For a version that cannot be imported here: runs the hook's own check on the wheel's source and
looks up each name that compat.py imports.
"""

import ast
import importlib
import sys
from pathlib import Path

from tests.runs.compat import skeleton
from tests.runs.compat.pins import ROOT

COMPAT = ROOT / "s3lora_serve" / "vllm_plugin" / "compat.py"


def imported_names(source: str) -> list[tuple[str, str]]:
    r"""Every name that a source imports from vLLM, with its module, including in functions.

    >>> imported_names("def f():\n    from vllm.envs import A, B as C\nimport vllm.lora")
    [('vllm.envs', 'A'), ('vllm.envs', 'B'), ('vllm.lora', '')]
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            found += [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.partition(".")[0] == "vllm"]
    return sorted(found)


def missing(names: list[tuple[str, str]]) -> list[str]:
    """The names that this vLLM does not define."""
    return [f"{module}.{name}".rstrip(".") for module, name in names if not _has(module, name)]


def _has(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
        if name and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def main() -> None:
    """Print how much of the contract was checked, or exit with what is broken."""
    wheel = Path(sys.argv[1])
    skeleton.install(wheel)
    names = imported_names(COMPAT.read_text())
    if gone := missing(names):
        sys.exit(f"compat.py imports what this vLLM does not have: {', '.join(gone)}")
    compat = importlib.import_module("s3lora_serve.vllm_plugin.compat")
    vars(compat)["installed_version"] = lambda: wheel.name.split("-")[1]  # not the installed vLLM's
    contract = importlib.import_module("s3lora_serve.vllm_plugin.contract")
    contract.check_contract()
    if obstacle := contract.skipping_obstacle():
        sys.exit(f"modules without weights could not be skipped: {obstacle}")
    print(f"{len(names)} imports and {len(contract._CONTRACT)} signatures as expected")


if __name__ == "__main__":
    main()
