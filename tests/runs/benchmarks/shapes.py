"""Adapters shaped like those of well-known models, with Gaussian factors."""

import torch

from s3lora_serve.spectral import Factors

MODELS = {
    # layers, width of the model, of keys and values, of the MLP
    "Llama-3.2-1B": (16, 2048, 512, 8192),
    "Llama-3-8B": (32, 4096, 1024, 14336),
    "Llama-3-70B": (80, 8192, 1024, 28672),
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter(
    model: str,
    rank: int,
    dtype: torch.dtype,
    projections: tuple[str, ...] | None = None,
    decades: float = 0.0,
) -> list[Factors]:
    """Modules of an adapter; the columns of each B decrease over `decades` powers of ten."""
    layers, width, keys, inner = MODELS[model]
    shapes = {
        "q_proj": (width, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, width),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(rank)
    fall = torch.logspace(0, -decades, rank)
    modules = []
    for layer in range(layers):
        for name, (m, n) in shapes.items():
            if projections and name not in projections:
                continue
            B = torch.randn(m, rank, generator=generator) * fall
            A = torch.randn(rank, n, generator=generator)
            modules.append(Factors(f"model.layers.{layer}.{name}", B.to(dtype), A.to(dtype), 1.0))
    return modules


def square(width: int, rank: int, count: int, dtype: torch.dtype = torch.bfloat16) -> list[Factors]:
    """Modules of equal shape, with `width` rows and columns."""
    generator = torch.Generator().manual_seed(rank + width)
    return [
        Factors(
            f"model.layers.{i}.q_proj",
            torch.randn(width, rank, generator=generator).to(dtype),
            torch.randn(rank, width, generator=generator).to(dtype),
            1.0,
        )
        for i in range(count)
    ]
