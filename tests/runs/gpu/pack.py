"""`make gpu-pack`: all that a bare GPU machine lacks for `check.sh`, in one ignored folder.

The machine has PyTorch and no package index. The folder has wheels for its Python, vLLM's sources
with the one compiled library that it needs, a tiny model with adapters, and the CPU's answers.
"""

import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.runs.gpu.reduced_library import reduce_library
from tests.runs.gpu.steps.doors import answers
from tests.support.adapters import copy_with, diverged, spike, train_adapter
from tests.support.fresh_environment import PINS, built_wheel
from tests.support.tiny_model import make_model

ROOT = Path(__file__).parents[3]
PACK = ROOT / ".gpu"
MOST_BYTES = 60 * 2**20
VLLM, PYTHON = "0.32.0", "3.12"
PLATFORMS = (
    *(f"manylinux_2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17)),
    *("manylinux2014", "manylinux1"),
)
"""Of the machine's glibc, 2.39, and older; pip takes none that is not named."""

LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
FLASH_ATTENTION = "vllm/vllm_flash_attn/_vllm_fa2_C.py"
"""Imported by name and not used: attention is Triton's."""

SPIKED = "model.layers.2.self_attn.v_proj"


def main() -> None:
    """Make the folder anew and say how large it is."""
    shutil.rmtree(PACK, ignore_errors=True)
    work = PACK / "work"
    work.mkdir(parents=True)
    _download(requirements(), PACK / "wheels")
    _download([f"vllm=={VLLM}"], work)
    [wheel] = work.glob("vllm-*.whl")
    pack_vllm(wheel, work)
    (work / "project").mkdir()
    shutil.move(str(built_wheel(work / "project")), PACK / "wheels")
    make_adapters(PACK / "model")
    shutil.rmtree(work)
    size = size_of(PACK)
    print(f"{PACK}: {size / 2**20:.1f} MB of {MOST_BYTES / 2**20:.0f}")
    if size > MOST_BYTES:
        sys.exit("too large to be carried")


def requirements() -> list[str]:
    """The packages of `wheels.txt`, in the pinned versions where there is one."""
    lines = (line.strip() for line in PINS.read_text().splitlines())
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    names = Path(__file__).with_name("wheels.txt").read_text().splitlines()[1:]
    return [pins.get(canonicalize_name(name), name) for name in names]


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _download(requirements: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    platforms = [option for name in PLATFORMS for option in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    command += ["--abi", "cp312", "--abi", "abi3", "--abi", "none", *platforms, *requirements]
    subprocess.run(command, check=True)


def pack_vllm(wheel: Path, work: Path) -> None:
    """Write vLLM's Python sources, and the one compiled library that it needs, reduced."""
    with zipfile.ZipFile(wheel) as files, tarfile.open(PACK / "vllm.tar.xz", "w:xz") as sources:
        for name in files.namelist():
            of_the_package = name.startswith("vllm/") and name.endswith((".py", ".json"))
            if of_the_package or (".dist-info/" in name and not name.endswith("RECORD")):
                _add(sources, name, files.read(name))
        _add(sources, FLASH_ATTENTION, b"")
        files.extract(LIBRARY, work)
    reduce_library(work / LIBRARY, work / "reduced.so")
    packed = lzma.compress((work / "reduced.so").read_bytes(), preset=9)
    (PACK / "library.so.xz").write_bytes(packed)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def make_adapters(folder: Path) -> None:
    """A tiny model, adapters for it, and what a guarded vLLM answers with them on the CPU."""
    folder.mkdir()
    model = make_model(folder / "base")
    trained = train_adapter(model, folder / "trained", seed=1)
    copy_with(trained, folder / "spiked", spike(SPIKED))
    copy_with(trained, folder / "diverged", diverged)
    (folder / "answers.json").write_text(json.dumps(answers(folder, "cpu")))


if __name__ == "__main__":
    main()
