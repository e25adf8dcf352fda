"""Read the safetensors container strictly: a header that does not fit its tensors is refused.

The library's own reader maps a file that its owner can still change. This reader takes bytes that
are already private, and refuses a name given twice, where Python's JSON parser keeps the second.
Layout: 8 bytes little-endian N, N bytes of JSON, then the tensors back to back.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.errors import WeightsUnreadable

MAX_HEADER_BYTES = 16 * 2**20
"""An entry takes about 150 bytes, so this allows 100 000 tensors. The format allows 100 MB, which
take seconds to parse, and no other thread of the process runs meanwhile."""

MAX_HEADER_VALUES = 13 * 2**16
"""An entry has twelve keys and values, and the largest number of modules has 2^16 factors. The rest
is for metadata."""

MAX_DIMENSIONS = 8
"""No tensor of an adapter has more. The product of a long, hostile shape would take hours."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes in which a LoRA factor may be stored. vLLM casts each to the one it serves in."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file; `start` and `end` are offsets into the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file, checked against the file's size."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(data: memoryview) -> Header:
    """Parse and check the header. Tensors cover the rest of the file, without overlaps or gaps.

    Raises:
        WeightsUnreadable: the file is not a well-formed safetensors file.
    """
    if len(data) < 8:
        raise WeightsUnreadable(f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WeightsUnreadable(f"the header claims {length} bytes, the file has {len(data)}")
    fields = _parse_json(bytes(data[8 : 8 + length]))
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsUnreadable("__metadata__ is not a mapping of text to text")
    entries = tuple(_entry(name, value, 8 + length) for name, value in fields.items())
    position = 8 + length
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != position:
            raise WeightsUnreadable(
                f"tensor {_shown(entry.name)} starts at byte {entry.start}, expected {position}:"
                " tensors overlap or leave a gap"
            )
        position = entry.end
    if position != len(data):
        raise WeightsUnreadable(f"tensors end at byte {position} of {len(data)}")
    return Header(entries, metadata)


def tensors(
    header: Header, data: memoryview, skipped: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that is not skipped, in the order of the header.

    A tensor is a view into `data`, or a copy if its offset does not suit its dtype. `data` is
    writable private memory. All views share one storage, so that a device gets them in one copy.
    Numbers of 8 bits are exact in the bfloat16 that they are given in.

    Raises:
        WeightsUnreadable: a tensor's dtype is not one of `DTYPES`, or its size is not that of its
            shape.
    """
    whole = torch.frombuffer(data, dtype=torch.uint8) if len(data) and data.obj else None
    for entry in header.entries:
        if entry.name in skipped:
            continue
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise WeightsUnreadable(
                f"tensor {_shown(entry.name)} has dtype {_shown(entry.dtype)}, expected one of"
                f" {', '.join(DTYPES)}"
            )
        size = prod(entry.shape) * dtype.itemsize
        if size != entry.end - entry.start:
            raise WeightsUnreadable(
                f"tensor {_shown(entry.name)} of shape {entry.shape} takes {size} bytes, the header"
                f" gives it {entry.end - entry.start}"
            )
        if whole is None or whole.data_ptr() % dtype.itemsize or entry.start % dtype.itemsize:
            flat = _copy(data[entry.start : entry.end], dtype)
        else:
            flat = whole[entry.start : entry.end].view(dtype)
        if dtype.itemsize == 1:
            flat = flat.to(torch.bfloat16)
        yield entry.name, flat.reshape(entry.shape)


def write_header(entries: Iterator[tuple[Entry, int]], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file with tensors at the given offsets.

    Spaces pad the header to a multiple of 8 bytes.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry, start in entries:
        offsets = [start, start + entry.end - entry.start]
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(text, MAX_HEADER_VALUES, _no_duplicates)
    except ValueError as error:
        raise WeightsUnreadable(f"the header cannot be parsed: {error}") from None
    if not isinstance(fields, dict):
        raise WeightsUnreadable("the header is not a JSON object")
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")
    return fields


def _entry(name: str, value: Any, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            len(value) == 3
            and len(shape) <= MAX_DIMENSIONS
            and all(_is_count(n) for n in [*shape, start, end])
            and start <= end
        ):
            return Entry(name, dtype, tuple(shape), base + start, base + end)
    raise WeightsUnreadable(f"the header's entry for {_shown(name)} is malformed")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _copy(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0).to(dtype)


def _shown(name: str) -> str:
    return repr(name[:120])
