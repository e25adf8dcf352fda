"""Plans for adapter folders, and the files that a test expects them to give."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import Adapter, read_adapter
from s3lora_serve.plans.folder import plan_name
from s3lora_serve.plans.schema import ModulePlan, Plan
from s3lora_serve.policy.limits import Limits
from tests.support.adapters import q_proj, write_adapter


def read(folder: Path) -> Adapter:
    """The adapter in a folder, as the gate reads it."""
    return read_adapter(copy_adapter(folder, Limits()), Limits())


def plan_for(
    adapter: Adapter,
    transforms: Mapping[str, torch.Tensor] | None = None,
    strip: Collection[str] = (),
    removed: float = 0.25,
) -> Plan:
    """A plan that transforms and strips these modules and keeps the others."""
    transforms = transforms or {}

    def module(name: str, rank: int) -> ModulePlan:
        if name in transforms:
            return ModulePlan.of(name, rank, transforms[name], removed)
        return ModulePlan(name=name, action="strip" if name in strip else "keep", rank=rank)

    return Plan(
        adapter_digest=adapter.copy.digest,
        config_digest=adapter.config.digest,
        base_model="tiny",
        modules=tuple(module(m.name, m.rank) for m in adapter.modules),
    )


def install(plan: Plan, folder: Path) -> Path:
    """Write a plan to where the gate looks for it."""
    folder.mkdir(mode=0o755, exist_ok=True)
    file = folder / plan_name(plan.adapter_digest)
    file.write_text(json.dumps(plan.as_json()))
    file.chmod(0o644)
    return file


def keep_out(A: torch.Tensor, count: int = 1) -> torch.Tensor:
    """The T that removes the directions of A's largest singular values from what B writes.

    B·T·A = B·A·(I − VVᵀ), with V the right singular vectors, since T = U(I − E)Uᵀ for A = U S Vᵀ.
    """
    U = torch.linalg.svd(A.double(), full_matrices=False)[0]
    return torch.eye(len(A), dtype=torch.float64) - U[:, :count] @ U[:, :count].T


def small_adapter(folder: Path, dtype: torch.dtype = torch.float32, layers: int = 3) -> Path:
    """An adapter of a few modules, r = 4, without a model to it."""
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(layers):
        B, A = torch.randn(24, 4, generator=random), torch.randn(4, 16, generator=random)
        tensors |= q_proj(layer, B.to(dtype), A.to(dtype))
    return write_adapter(folder, tensors)
