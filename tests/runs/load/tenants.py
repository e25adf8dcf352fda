"""Adapters of fifty tenants: good ones with different answers, bad ones, and hostile ones."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from s3lora_serve import Policy, strip_adapter
from tests.support.adapters import CONFIG, WEIGHTS, Tensors, copy_with, key, train_adapter

GOOD, BAD = 38, 12
TRAINED = 6
"""Number of trained adapters; the other good ones are these with noise, so answers differ."""

MODULE = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Tenant:
    """One adapter and the expected result of its registration."""

    name: str
    folder: Path
    code: str | None  # of the refusal
    stripped: Path | None = None  # the adapter as the gate serves it, written by `strip_adapter`

    def write(self, folder: Path) -> None:
        """Write the adapter into a new folder, which its owner may change."""
        shutil.copytree(self.folder, folder, symlinks=True)


def make_tenants(model: Path, root: Path, policy: Policy) -> list[Tenant]:
    """Train adapters, add noise to copies, and damage others."""
    trained = [train_adapter(model, root / f"trained-{i}", seed=i + 1) for i in range(TRAINED)]
    tenants = [_good(trained[i % TRAINED], root, i, policy) for i in range(GOOD)]
    for i, (label, (make, code)) in enumerate(BREAKERS.items()):
        folder = copy_with(trained[i % TRAINED], root / f"bad-{i}")
        make(folder)
        tenants.append(Tenant(f"bad-{i}-{label}", folder, code))
    assert len(tenants) == GOOD + BAD
    return tenants


def _good(source: Path, root: Path, number: int, policy: Policy) -> Tenant:
    def noise(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(number)
        for tensor in tensors.values():
            tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    folder = copy_with(source, root / f"good-{number}", noise)
    stripped = root / f"stripped-{number}"
    assert strip_adapter(folder, stripped, policy, "cpu").decision == "stripped"
    return Tenant(f"good-{number}", folder, None, stripped)


def _tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        aside = folder.with_name(folder.name + "-aside")
        copy_with(folder, aside, change)
        shutil.rmtree(folder)
        aside.rename(folder)

    return make


def _config(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(raw | changes))

    return make


def _cut(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])


def _lying_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{}")


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _link_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def _nan(tensors: Tensors) -> None:
    tensors[key(MODULE, "A")][0, 0] = float("nan")


def _no_partner(tensors: Tensors) -> None:
    del tensors[key(MODULE, "B")]


def _wide(tensors: Tensors) -> None:
    tensors[key(MODULE, "A")] = tensors[key(MODULE, "A")].repeat(1, 2)


def _foreign(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)


BREAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (_tensors(_nan), "S3LORA-109"),
    "no-partner": (_tensors(_no_partner), "S3LORA-108"),
    "wide": (_tensors(_wide), "S3LORA-301"),
    "foreign": (_tensors(_foreign), "S3LORA-110"),
    "cut": (_cut, "S3LORA-104"),
    "lying-header": (_lying_header, "S3LORA-104"),
    "pickle": (_pickle, "S3LORA-102"),
    "empty": (_empty, "S3LORA-104"),
    "link": (_link_out, "S3LORA-101"),
    "not-lora": (_config(peft_type="IA3"), "S3LORA-103"),
    "scaled": (_config(lora_alpha=10**6), "S3LORA-201"),
    "patterns": (_config(rank_pattern={"(a+)+$": 8}), "S3LORA-103"),
}


def tamper(folder: Path, generator: random.Random) -> None:
    """Edit, truncate or delete a registered folder, or leave it, as its owner may do."""
    weights = folder / WEIGHTS
    change = generator.choice(["keep", "edit", "cut", "delete"])
    if change == "edit":
        with weights.open("r+b") as file:
            file.seek(-2000, 2)
            file.write(b"\x7f" * 2000)
    elif change == "cut":
        with weights.open("r+b") as file:
            file.truncate(1000)
    elif change == "delete":
        shutil.rmtree(folder)
