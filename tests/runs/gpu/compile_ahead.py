"""`python -m tests.runs.gpu.compile_ahead ARCHITECTURE…`: compile the kernels for absent GPUs.

Triton's compiler and the ptxas of its wheel need no GPU. Each variant is compiled in a process of
its own, since a compiler may end its process. Prints a JSON object for each.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

WARP = 32
LAYOUTS = ("rows", "columns")


class Variant(NamedTuple):
    """One kernel with its constants, for one architecture."""

    kernel: str
    architecture: int  # 90 for sm_90
    rank: int
    dtype: str = ""
    layout: str = ""


def variants(
    architectures: list[int], ranks: list[int], dtypes: list[str], layouts: list[str]
) -> Iterator[Variant]:
    """Variants of all kernels, as `device` launches them."""
    for architecture, rank in product(architectures, ranks):
        yield Variant("factorise", architecture, rank)
        yield Variant("spectrum", architecture, rank)
        for dtype, layout in product(dtypes, layouts):
            yield Variant("gram", architecture, rank, dtype, layout)
            yield Variant("normalised_gram", architecture, rank, dtype, layout)


def compiled(variant: Variant) -> dict[str, Any]:
    """Compile one variant; its size and what it needs of a multiprocessor."""
    started = time.monotonic()
    kernel = _compile(variant)
    ptx, image = kernel.asm["ptx"], kernel.asm["cubin"]
    return {
        **variant._asdict(),
        "seconds": round(time.monotonic() - started, 2),
        "cubin_bytes": len(image),
        "shared_bytes": kernel.metadata.shared,
        **_usage(image),
        "tf32": ptx.count("tf32"),
    }


def _compile(variant: Variant) -> Any:
    """Launch a whole part, whose kernels are compiled and not run; the one that is wanted."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from s3lora_serve.spectral import device, launches

    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def only_compile(function: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        if function.__name__ == variant.kernel:
            kernels[variant.kernel] = run(function, *arguments, grid=grid, warmup=True, **more)
        return kernels.get(variant.kernel)

    JITFunction.run = only_compile
    launches.capability = lambda _: variant.architecture // 10
    driver.set_active(_Driver(variant.architecture))
    dtype = getattr(torch, variant.dtype or "float32")
    B, A = torch.zeros(96, variant.rank, dtype=dtype), torch.zeros(variant.rank, 96, dtype=dtype)
    if variant.layout == "columns":
        B = B.mT.contiguous().mT
    else:
        A = A.mT.contiguous().mT
    device._solve([(B, A)], torch.device("cpu"), lambda: None)
    return kernels[variant.kernel]


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, WARP)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def _usage(image: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, as the wheel's cuobjdump says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(found[1])
        for name, key in (("registers", "REG"), ("stack_bytes", "STACK"))
        if (found := re.search(rf"{key}:(\d+)", text))
    }


def _in_a_process(variant: Variant) -> dict[str, Any]:
    """What `compiled` gives, or why there is nothing: a compiler may end its process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(writer, 2)  # what it says goes the same way
        try:
            os.write(writer, b"\n" + json.dumps(compiled(variant)).encode() + b"\n")
        except BaseException as error:  # noqa: BLE001 - the parent gets it
            os.write(writer, f"\n{type(error).__name__}: {error}\n".encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as output:  # noqa: PTH123 - a file descriptor
        said = output.read().splitlines()
    os.waitpid(child, 0)
    last = said[-1] if said else "died"
    return json.loads(last) if last.startswith("{") else {**variant._asdict(), "failed": last}


def main() -> None:
    """Compile all variants, as many at a time as there are cores, and print what came of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import torch  # noqa: F401 - once, before the forks
        import triton  # noqa: F401

        _run(list(variants(given.architectures, given.ranks, given.dtypes, given.layouts)))


def _run(todo: list[Variant]) -> None:
    """Each core's process takes every so-manieth variant, and forks for each."""
    cores = os.cpu_count() or 1
    children = []
    for core in range(cores):
        if not (child := os.fork()):
            for variant in todo[core::cores]:
                print(json.dumps(_in_a_process(variant)), flush=True)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
