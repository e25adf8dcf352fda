"""The names of scorers: one list for the policy, the spectral engine and the command line."""

from typing import Final, Literal, get_args

AlignmentScorer = Literal["safe-lora", "splora"]
"""They compare modules with what alignment changed, from a reference; a low score goes first."""

ServingScorer = Literal["mas-svd", AlignmentScorer]
"""Fast enough for serving."""

OfflineScorer = Literal["svd", "spsvd", "dense"]
"""Slow ones, to compare with. A server refuses them."""

AnyScorer = Literal[ServingScorer, OfflineScorer]

MAS_SVD: Final = "mas-svd"
SAFE_LORA: Final = "safe-lora"
SPLORA: Final = "splora"

ALIGNMENT: tuple[str, ...] = get_args(AlignmentScorer)
SERVING: tuple[str, ...] = get_args(ServingScorer)
OFFLINE: tuple[str, ...] = get_args(OfflineScorer)
COMPARED: tuple[str, ...] = tuple(name for name in get_args(AnyScorer) if name != "dense")
"""What commands offer; `dense` is the definition, for tests."""
