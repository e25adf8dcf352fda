"""The safetensors reader accepts files of the library and rejects inconsistent headers."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from s3lora_serve.adapter.safetensors_format import read_header, tensors
from s3lora_serve.errors import WeightsUnreadable

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.ones(2, 2, dtype=torch.float16),
}


def read(data: bytes) -> dict[str, torch.Tensor]:
    buffer = memoryview(bytearray(data))
    return dict(tensors(read_header(buffer), buffer))


def file(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(start: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_reads_what_the_library_writes_bit_for_bit():
    found = read(save(TENSORS, metadata={"format": "pt"}))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_reads_tensors_that_lie_at_odd_offsets():
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (1 - len(header) % 2)
    values = torch.tensor([1.5, -2.0])
    assert torch.equal(read(file(header, values.numpy().tobytes()))["x"], values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (2**63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        file(b"not json"),
        file(b"[]"),
        file(b"[" * 100_000),
        file({"__metadata__": {"a": 1}}),
        file({"x": entry(0, 8)}),
        file({"x": entry(0, 8)}, bytes(9)),
        file({"x": entry(4, 8)}, bytes(8)),
        file({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)),
        file({"x": entry(0, 8), "y": entry(0, 8)}, bytes(8)),
        file({"x": entry(0, 8, [3])}, bytes(8)),
        file({"x": entry(0, 8, [-2])}, bytes(8)),
        file({"x": entry(0, 8, [2.0])}, bytes(8)),
        file({"x": entry(0, 8, [True, 2])}, bytes(8)),
        file({"x": entry(0, 8, dtype="I64")}, bytes(8)),
        file({"x": entry(0, 8, dtype=["F32"])}, bytes(8)),
        file({"x": {**entry(0, 8), "more": 1}}, bytes(8)),
        file({"x": {"dtype": "F32"}}, bytes(8)),
        file({"x": entry(8, 0)}, bytes(8)),
        file({"x": entry(0, 8, [2**40, 2**40])}, bytes(8)),
        file({"x": entry(0, 8, [2**62] * 100_000)}, bytes(8)),
        file(b'{"x":%b,"x":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
    ],
    ids=range(25),
)
def test_a_file_that_is_not_well_formed_is_refused(data):
    with pytest.raises(WeightsUnreadable, match="S3LORA-104"):
        read(data)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_read_or_refused_and_never_crashes(data):
    whole = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    with suppress(WeightsUnreadable):
        read(bytes(whole[:cut]))
