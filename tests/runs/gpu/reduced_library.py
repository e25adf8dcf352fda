"""vLLM's compiled library with the machine code of one GPU architecture alone, which halves it.

A fat binary in an ELF file is a header of 16 bytes and parts, each with its kind, sizes and
architecture. The wanted parts are moved to the front and the size in the header is set to theirs.
"""

import struct
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
VERSION, HEADER = 1, 16
MACHINE_CODE = 2  # other parts hold PTX


def reduce_library(source: Path, target: Path, architecture: int = 90) -> int:
    """Write the library with machine code for `architecture` alone; bytes that were cut."""
    data = bytearray(source.read_bytes())
    cut, at = 0, 0
    while (at := data.find(MAGIC, at)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        if version != VERSION or header != HEADER or at + HEADER + size > len(data):
            at += 4
            continue
        start, end = at + HEADER, at + HEADER + size
        kept = b"".join(_parts(data, start, end, architecture))
        if kept:  # a binary without the architecture stays as it is
            data[start:end] = kept + bytes(size - len(kept))
            struct.pack_into("<Q", data, at + 8, len(kept))
            cut += size - len(kept)
        at = end
    target.write_bytes(data)
    return cut


def _parts(data: bytearray, at: int, end: int, architecture: int) -> list[bytes]:
    """The parts between two offsets that are machine code for one architecture."""
    found = []
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        (of,) = struct.unpack_from("<I", data, at + 28)
        if kind == MACHINE_CODE and of == architecture:
            found.append(bytes(data[at : at + header + size]))
        at += header + size
    return found
