"""The adapters of a large fleet: variations of trained ones, and hostile ones made from those."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.runs.load.tenants import BREAKERS, MODULE, Tenant
from tests.support.adapters import CONFIG, WEIGHTS, Tensors, key

HOSTILE = 5
"""One adapter of this many is hostile."""

RANKS = (2, 4, 8)
FEWEST = 8
"""Modules of an adapter at least, of 28."""


@dataclass(frozen=True)
class Member(Tenant):
    """An adapter that is written when it is registered; no other has its content."""

    number: int = 0
    spoil: Callable[[Path], None] | None = None

    def write(self, folder: Path) -> None:
        """A trained adapter with noise, fewer ranks and fewer modules, by the member's number."""
        draw = random.Random(self.number)
        generator = torch.Generator().manual_seed(self.number)
        source = load_file(self.folder / WEIGHTS)
        rank = draw.choice(RANKS)
        modules = sorted({name.removesuffix(".lora_A.weight") for name in source} - set(source))
        names = [name.removeprefix("base_model.model.") for name in modules]
        kept = {MODULE, *draw.sample(names, draw.randint(FEWEST, len(names)))}
        tensors: Tensors = {}
        for name in sorted(kept):
            A, B = source[key(name, "A")][:rank], source[key(name, "B")][:, :rank]
            for side, tensor in (("A", A), ("B", B)):
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[key(name, side)] = (tensor + 0.3 * tensor.std() * noise).contiguous()
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((self.folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"r": rank, "lora_alpha": 2 * rank}))
        if self.spoil is not None:
            self.spoil(folder)


def make_fleet(trained: list[Path], tenants: list[Tenant], count: int) -> list[Tenant]:
    """The good tenants, whose answers are known, and members until there are `count`."""
    fleet = [tenant for tenant in tenants if tenant.stripped]
    breakers = list(BREAKERS.values())
    for number in range(count - len(fleet)):
        source = trained[number % len(trained)]
        if number % HOSTILE:
            fleet.append(Member(f"fleet-{number}", source, None, number=number))
        else:
            spoil, code = breakers[number // HOSTILE % len(breakers)]
            fleet.append(Member(f"fleet-{number}", source, code, number=number, spoil=spoil))
    return fleet
