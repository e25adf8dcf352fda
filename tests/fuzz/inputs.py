"""Malformed adapters and policies: valid ones, changed in one or several places."""

import base64
import json
import struct
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from s3lora_serve.alignment.reference_file import METADATA_KEY

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "F8_E4M3": 1, "": 3}
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308])
)
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.one_of(
    st.builds(
        "{}model.layers.{}.{}.lora_{}{}".format,
        st.sampled_from(["base_model.model.", "", "base_model.model.base_model.model.", "x."]),
        st.integers(0, 12),
        st.sampled_from(["self_attn.q_proj", "mlp.up_proj", "mlp.experts.0.w1", "q proj", "ü"]),
        st.sampled_from(["A", "B", "C", "magnitude_vector", "embedding_A"]),
        st.sampled_from([".weight", "", ".bias", ".default.weight"]),
    ),
    st.text(max_size=12),
)
PATTERNS = st.one_of(
    st.sampled_from(
        ["q_proj", r".*\.q_proj", "(a+)+$", "[", r"\d+", "a" * 300, "^model", "q_proj$"]
    ),
    st.text(max_size=6),
)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """The bytes of adapter_config.json and adapter_model.safetensors."""
    rank = draw(st.integers(1, 6))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": draw(st.integers(1, 32)),
    }
    entries, body = _modules(draw, rank)
    for _ in range(draw(st.integers(0, 3))):
        draw(st.sampled_from([_change_config, _change_entries]))(draw, config, entries)
    header = json.dumps(entries).encode()
    weights = struct.pack("<Q", len(header)) + header + body
    return json.dumps(config).encode(), _damaged(draw, weights)


def _modules(draw: st.DrawFn, rank: int) -> tuple[dict[str, Any], bytes]:
    """A valid header and the bytes of its tensors."""
    entries: dict[str, Any] = {}
    body = b""
    dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64"]))
    size = DTYPES[dtype]
    for layer in range(draw(st.integers(1, 4))):
        m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        for side, shape in (("A", [rank, n]), ("B", [m, rank])):
            length = shape[0] * shape[1] * size
            content = draw(st.sampled_from(["noise", "noise", "noise", "zeros", "any bits"]))
            data = _content(draw, content, dtype, shape[0] * shape[1])
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            offsets = [len(body), len(body) + length]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            body += data
    return entries, body


def _content(draw: st.DrawFn, kind: str, dtype: str, count: int) -> bytes:
    size = DTYPES[dtype]
    if kind == "zeros":
        return bytes(count * size)
    if kind == "any bits":
        return draw(st.binary(min_size=count * size, max_size=count * size))
    random = draw(st.randoms(use_true_random=False))
    values = [max(-9.0, min(9.0, random.gauss(0, 1))) for _ in range(count)]
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{count}{ {'F64': 'd', 'F32': 'f', 'F16': 'e'}[dtype] }", *values)


def _change_config(draw: st.DrawFn, config: dict[str, Any], entries: dict[str, Any]) -> None:
    key = draw(
        st.sampled_from(
            ["peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "modules_to_save", "bias",
             "lora_bias", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "surplus"]
        )
    )  # fmt: skip
    if key.endswith("_pattern") and draw(st.booleans()):
        config[key] = draw(st.dictionaries(PATTERNS, NUMBERS, max_size=3))
    elif draw(st.booleans()):
        config[key] = draw(JUNK)
    else:
        config.pop(key, None)


def _change_entries(draw: st.DrawFn, config: dict[str, Any], entries: dict[str, Any]) -> None:
    if not entries:
        return
    name = draw(st.sampled_from(sorted(entries)))
    entry = entries[name]
    how = draw(st.sampled_from(["rename", "drop", "copy", "shape", "dtype", "offsets", "junk"]))
    if how == "rename":
        entries[draw(NAMES)] = entries.pop(name)
    elif how == "drop":
        del entries[name]
    elif how == "copy":
        entries[draw(NAMES)] = entry
    elif how == "junk" or not isinstance(entry, dict):
        entries[name] = draw(JUNK)
    elif how == "dtype":
        entries[name] = entry | {"dtype": draw(st.sampled_from(sorted(DTYPES)))}
    else:
        field = "shape" if how == "shape" else "data_offsets"
        entries[name] = entry | {field: draw(st.lists(NUMBERS, max_size=3))}


def _damaged(draw: st.DrawFn, weights: bytes) -> bytes:
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "longer", "length", "byte", "noise"]))
    if how == "cut":
        return weights[: draw(st.integers(0, len(weights)))]
    if how == "longer":
        return weights + draw(st.binary(min_size=1, max_size=9))
    if how == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + weights[8:]
    if how == "byte":
        i = draw(st.integers(0, len(weights) - 1))
        return weights[:i] + draw(st.binary(min_size=1, max_size=1)) + weights[i + 1 :]
    return draw(st.binary(max_size=64)) if how == "noise" else weights


KEYS = ["mode", "scorer", "modules", "strip", "limits", "deny", "allow", "on_uninformative",
        "on_unscorable", "audit", "store", "required", "plans", "require_plan", "rules",
        "action", "signatures", "attestations", "surplus"]  # fmt: skip
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(["enforce", "audit", "off", True]),
    "strip": st.dictionaries(
        st.sampled_from(["top_k", "fraction", "threshold", "outliers"]), NUMBERS, max_size=2
    ),
    "limits": st.dictionaries(
        st.sampled_from(["max_scaling", "seconds", "max_bytes", "max_rank", "min_rank", "roots"]),
        NUMBERS | st.just([]), max_size=3,
    ),
    "deny": st.lists(st.sampled_from(["sha256:" + "0" * 64, "sha256:0", ""]), max_size=2),
    "action": st.sampled_from(["strip", "project", "drop"]),
    "scorer": st.dictionaries(
        st.sampled_from(["name", "reference", "rank", "normalization"]),
        st.sampled_from(["safe-lora", "splora", "mas-svd", "svd", "row", "/reference", 4, None]),
        max_size=3,
    ),
    "signatures": st.dictionaries(
        st.sampled_from(["require", "keys", "certificates", "trust_root", "file"]),
        st.booleans() | st.sampled_from(["/key", ["/key"], [], "model.sig", "a/b", None]),
        max_size=3,
    ),
    "attestations": st.dictionaries(
        st.sampled_from(["require", "keys", "max_age", "policy_digest", "trust_scores"]),
        st.booleans() | NUMBERS | st.sampled_from([["/key"], [], "same", "any", None]), max_size=4,
    ),
    "plans": st.sampled_from(["/plans", "plans", None]),
    "require_plan": st.booleans(),
    "rules": st.lists(
        st.fixed_dictionaries(
            {"match": st.dictionaries(st.sampled_from(["adapter", "path", "x"]), PATTERNS)},
            optional={"strip": st.just({"top_k": 1}), "limits": JUNK, "mode": st.just("off")},
        ),
        max_size=2,
    ),
}  # fmt: skip


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Plain data that may or may not be a valid policy."""
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
    return {
        key: draw(SENSIBLE[key] if key in SENSIBLE and draw(st.booleans()) else JUNK)
        for key in keys
    }


@st.composite
def plans(draw: st.DrawFn, plan: dict[str, Any]) -> bytes:
    """The bytes of a plan file: this valid plan, changed in one or several places."""
    data = json.loads(json.dumps(plan))
    for _ in range(draw(st.integers(0, 3))):
        modules = data.get("modules")
        parts = (
            [data, *(one for one in modules or [] if isinstance(one, dict))]
            if isinstance(modules, list)
            else [data]
        )
        part = draw(st.sampled_from(parts))
        key = draw(st.sampled_from([*part, "surplus"]))
        how = draw(st.sampled_from(["junk", "drop", "other", "matrix"]))
        if how == "junk":
            part[key] = draw(JUNK)
        elif how == "drop":
            part.pop(key, None)
        elif how == "matrix":
            entries = draw(st.lists(st.floats(width=32), min_size=1, max_size=16))
            matrix = struct.pack(f"<{len(entries)}f", *entries)
            part |= {"action": "transform", "transform": base64.b64encode(matrix).decode()}
        else:
            part[key] = draw(
                st.sampled_from(["keep", "strip", "transform", 4, 2**16, plan["adapter_digest"]])
            )
    return _damaged(draw, json.dumps(data).encode())


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """The bytes of a JSON document: this valid one, changed in one or several places."""
    return _damaged(draw, json.dumps(draw(changed_values(valid))).encode())


@st.composite
def changed_values(draw: st.DrawFn, valid: Any) -> Any:
    """JSON values: these valid ones, changed in one or several places at any depth."""
    data = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        part = data
        while True:
            keys = sorted(part) if isinstance(part, dict) else range(len(part))
            key = draw(st.sampled_from([*keys, "surplus" if isinstance(part, dict) else len(part)]))
            inner = part[key] if key in keys else None
            if not (isinstance(inner, dict | list) and draw(st.booleans())):
                break
            part = inner
        if key not in keys and isinstance(part, list):
            part.append(draw(JUNK))
        elif key in keys and draw(st.booleans()):
            del part[key]
        else:
            part[key] = draw(JUNK)
    return data


@st.composite
def references(draw: st.DrawFn, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> bytes:
    """The bytes of a reference file: this valid one, changed in one or several places."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    told = json.loads(json.dumps(about))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        how = draw(st.sampled_from(["entry", "scale", "shape", "drop", "junk", "record"]))
        if name not in changed and how in ("entry", "scale", "shape", "drop"):
            continue
        if how == "entry":
            flat = changed[name].reshape(-1)
            if len(flat):
                flat[draw(st.integers(0, len(flat) - 1))] = draw(st.floats(width=32))
        elif how == "scale":
            changed[name] = changed[name] * draw(st.sampled_from([-1.0, 0.0, 0.999, 1.1, 1e30]))
        elif how == "shape":
            changed[name] = changed[name].reshape(-1)[: draw(st.integers(0, 40))].clone()
        elif how == "drop":
            del changed[name]
        elif how == "junk":
            told[draw(st.sampled_from([*about, "surplus"]))] = draw(JUNK)
        else:
            records = told.get("modules")
            if isinstance(records, dict) and records:
                record = records[draw(st.sampled_from(sorted(records)))]
                if isinstance(record, dict):
                    record[draw(st.sampled_from(["shape", "frobenius"]))] = draw(JUNK | NUMBERS)
    metadata = {METADATA_KEY: json.dumps(told)}
    return _damaged(draw, save_safetensors(changed, metadata=metadata))
