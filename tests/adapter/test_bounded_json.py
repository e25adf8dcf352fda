"""A tenant's JSON is parsed only if its number of values is bounded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.adapter import bounded_json
from s3lora_serve.adapter.bounded_json import parse_json
from s3lora_serve.adapter.peft_config import parse_config
from s3lora_serve.adapter.reader import MAX_MODULES
from s3lora_serve.adapter.safetensors_format import Entry, read_header, write_header
from s3lora_serve.errors import ConfigInvalid
from s3lora_serve.signatures.envelope import verified
from tests.support.adapters import WEIGHTS, copy_with, key

LEAVES = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v))


def count(value):
    """The values of a JSON value, keys included."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(count, value.values()))
    return 1 + sum(map(count, value)) if isinstance(value, list) else 1


@given(value=VALUES, encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_no_text_holds_more_values_than_are_counted_before_it_is_parsed(value, encoding):
    text = json.dumps(value, ensure_ascii=False).encode(encoding, "surrogatepass")
    assert parse_json(text, 1_000_000) == value
    with pytest.raises(ValueError, match="values"):
        parse_json(text, count(value) - 1)


@pytest.fixture
def parsed(monkeypatch):
    """The lengths of the texts that were given to Python's parser."""
    lengths, loads = [], json.loads

    def recorded(text, **options):
        lengths.append(len(text))
        return loads(text, **options)

    monkeypatch.setattr(bounded_json.json, "loads", recorded)
    return lengths


LISTS = b"[" + b"[]," * 5_500_000 + b"[]]"
NUMBERS = b"[1" + b",1" * 4_000_000 + b"]"


@pytest.mark.parametrize("values", [LISTS, NUMBERS], ids=["lists", "numbers"])
def test_header_of_millions_of_values_is_refused_unparsed(trained, tmp_path, parsed, values):
    entry = b'{"x":%b}' % values
    folder = copy_with(trained, tmp_path / "hostile")
    (folder / WEIGHTS).write_bytes(len(entry).to_bytes(8, "little") + entry)
    verdict = scan_adapter(folder, Policy())
    assert verdict.reason.code == "S3LORA-104"
    assert len(entry) not in parsed


def test_configuration_and_envelope_of_many_values_are_refused_unparsed(parsed):
    lists = LISTS[: 2**20 - 3] + b"[]]"
    with pytest.raises(ConfigInvalid, match="values"):
        parse_config(b'{"modules_to_save":%b}' % lists)
    with pytest.raises(ValueError, match="envelope"):
        verified(lists, [])
    assert not parsed


def test_header_of_the_largest_number_of_modules_is_parsed():
    names = [key(f"model.layers.{n}.q_proj", side) for n in range(MAX_MODULES) for side in "AB"]
    entries = (Entry(name, "F32", (1, 1), 4 * n, 4 * n + 4) for n, name in enumerate(names))
    header = write_header(((entry, entry.start) for entry in entries), {"format": "pt"})
    data = memoryview(bytearray(header + bytes(4 * len(names))))
    assert len(read_header(data).entries) == 2 * MAX_MODULES


def test_configuration_of_the_largest_patterns_is_parsed():
    names = [f"m{n}" for n in range(MAX_MODULES)]
    patterns = {"rank_pattern": dict.fromkeys(names, 4), "alpha_pattern": dict.fromkeys(names, 8)}
    more = {"target_modules": names, "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    text = json.dumps(patterns | more, separators=(",", ":")).encode()
    assert len(parse_config(text).ranks) == MAX_MODULES
