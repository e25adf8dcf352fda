"""Which keys one policy relaxes beside another, and whether an adapter's name alone decides that.

Tenants choose the names of their adapters. So a rule that only a name has to match may demand more
than the policy does, and never less.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

Json = Mapping[str, Any]


def relaxed_keys(before: Json, after: Json) -> list[str]:
    """The keys of a policy's JSON by which `after` may admit what `before` refuses.

    A key that the tables of this module do not list counts whenever it differs.
    """
    old, new = _leaves(before), _leaves(after)
    return sorted(
        key
        for key in old.keys() | new.keys()
        if key not in METHOD
        and old.get(key) != new.get(key)
        and not (key in STRICTER and STRICTER[key](old.get(key), new.get(key)))
    )


def is_fixed_folder(glob: str) -> bool:
    """Whether a path glob begins with a folder that no wildcard stands for, or has no wildcard.

    >>> is_fixed_folder("/adapters/acme/**"), is_fixed_folder("/**"), is_fixed_folder("**/acme/*")
    (True, False, False)
    """
    literal = re.split(r"[*?]", glob)[0]
    if literal == glob:
        return True
    folder = re.sub(r"^[\w+.-]+://", "/", literal).rpartition("/")[0]
    return folder.strip("/") != ""


def _leaves(policy: Json) -> dict[str, Any]:
    """The keys of a policy, those of its mappings by their dotted names; rules are left out."""
    found: dict[str, Any] = {}
    for key, value in policy.items():
        if key == "rules":
            continue
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def _at_most(old: Any, new: Any) -> bool:
    """None is no bound."""
    return old is None or (new is not None and new <= old)


def _at_least(old: Any, new: Any) -> bool:
    return bool(new >= old)


def _demanded(_old: Any, new: Any) -> bool:
    return new is True


def _not_granted(_old: Any, new: Any) -> bool:
    return new is False


def _more(old: Iterable[str], new: Iterable[str]) -> bool:
    return set(new) >= set(old)


def _fewer(old: Iterable[str], new: Iterable[str]) -> bool:
    return set(new) <= set(old)


def _below(old: list[str], new: list[str]) -> bool:
    """Whether each folder lies under one of those before; no folder at all is no bound."""
    if not old:
        return True
    return bool(new) and all(
        any(PurePosixPath(folder).is_relative_to(root) for root in old)
        and ".." not in PurePosixPath(folder).parts
        for folder in new
    )


def _one_of(*strictest_first: str) -> Callable[[Any, Any], bool]:
    """None: the mapping that the key is in is off."""

    def is_stricter(old: Any, new: Any) -> bool:
        if old is None or new is None:
            return old is None
        return strictest_first.index(new) <= strictest_first.index(old)

    return is_stricter


STRICTER: Mapping[str, Callable[[Any, Any], bool]] = {
    "limits.max_stripped_fraction": _at_most,
    "limits.max_scaling": _at_most,
    "limits.max_norm_ratio": _at_most,
    "limits.seconds": _at_most,
    "limits.download_seconds": _at_most,
    "limits.max_bytes": _at_most,
    "limits.negative_alpha": _not_granted,
    "limits.min_rank": _at_least,
    "limits.max_rank": _at_most,
    "limits.formats": _fewer,
    "limits.roots": _below,
    "repair.strength": _at_most,
    "repair.max_effect": _at_most,
    "repair.on_missing": _one_of("reject", "leave"),
    "deny": _more,
    "on_uninformative": _one_of("reject", "admit"),
    "on_unscorable": _one_of("reject", "strip", "admit"),
    "require_plan": _demanded,
    "signatures.require": _demanded,
    "attestations.require": _demanded,
    "attestations.max_age": _at_most,
    "attestations.policy_digest": _one_of("same", "any"),
    "attestations.trust_scores": _not_granted,
}
"""Whether a new value admits nothing that the old one refuses. A key that is missing here, as the
signers are, may not differ at all."""

METHOD = frozenset(
    {
        "modules", "action", "negligible", "strip.top_k", "strip.fraction", "strip.threshold",
        "strip.outliers", "scorer.name", "scorer.rank", "scorer.normalization",
    }
)  # fmt: skip
"""How an adapter is scored and changed. Two methods have no order of strictness, so a rule may
choose by name; `owners` keep names from those who would choose among them."""
