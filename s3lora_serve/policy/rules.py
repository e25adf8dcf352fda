"""The rules of a policy: which adapters one is for, and which keys it may set."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from s3lora_serve.policy.globs import GlobText, glob_matches
from s3lora_serve.policy.relaxing import Json, is_fixed_folder, relaxed_keys
from s3lora_serve.policy.section import Section


class Match(Section):
    """What an adapter must have for a rule to apply. What is unset, every adapter has."""

    adapter: GlobText | None = None
    """Glob of adapter names."""
    path: GlobText | None = None
    """Glob of real paths."""
    base_model: GlobText | None = None
    """Glob of base models, as vLLM was given them."""
    signer: str | None = None
    """As `signed_by.id` in verdicts; no glob."""

    @property
    def is_bound(self) -> bool:
        """Whether a folder or a signer has to match: tenants choose those less than names."""
        return self.signer is not None or (self.path is not None and is_fixed_folder(self.path))

    def holds(self, name: str, path: str, base_model: str | None, signer: str | None) -> bool:
        """Whether an adapter matches; without a verified signer none matches by signer."""
        if self.signer is not None and signer != self.signer:
            return False
        facts = ((self.adapter, name), (self.path, path), (self.base_model, base_model or ""))
        return all(glob is None or glob_matches(glob, fact) for glob, fact in facts)


class Rule(BaseModel):
    """A match and the policy keys that it overrides, checked against the schema of `Policy`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    match: Match


SERVERS = frozenset(
    {
        "rules", "mode", "audit", "store", "required", "plans", "experiments", "rates", "owners",
        "unguarded_frontends",
    }
)  # fmt: skip
"""Keys that no rule may set."""

_REFERENCE = {"reference", "reference_digest"}
_STATISTICS = {"statistics", "statistics_digest"}

_BEFORE_SIGNATURE = {"signatures", "attestations", "scorer", "modules"}
_LIMITS_BEFORE_SIGNATURE = {"max_bytes", "formats", "roots", "seconds", "download_seconds"}
"""What holds before a signature is verified, or what an attestation vouches for."""


def check_keys(rule: Rule) -> None:
    """Check that a rule sets nothing that it may not.

    Raises:
        ValueError: it does; the message names the keys.
    """
    own = rule.model_extra or {}
    if unfit := sorted(SERVERS & set(own)):
        raise ValueError(f"{', '.join(unfit)} cannot be set by a rule: they are the server's")
    if _REFERENCE & _keys(own.get("scorer")):
        raise ValueError("scorer.reference cannot be set by a rule: it is the server's")
    if _STATISTICS & _keys(own.get("repair")):
        raise ValueError("repair.statistics cannot be set by a rule: it is the server's")
    if rule.match.signer is None:
        return
    early = _LIMITS_BEFORE_SIGNATURE & _keys(own.get("limits"))
    unfit = sorted((_BEFORE_SIGNATURE & set(own)) | {f"limits.{key}" for key in early})
    if unfit:
        raise ValueError(
            f"{', '.join(unfit)} cannot be set by signer: they are used before the signature is"
            " verified; match by path instead"
        )


def check_names_relax_nothing(rules: Sequence[Rule], whole: Json, variants: Sequence[Json]) -> None:
    """Check that rules which names alone have to match admit nothing that is refused without them.

    Args:
        rules: the policy's.
        whole: the policy's JSON.
        variants: the JSON of the policy with each rule applied alone.

    Raises:
        ValueError: one does; the message names it, its keys and a remedy.
    """
    for place, (rule, variant) in enumerate(zip(rules, variants, strict=True)):
        if rule.match.is_bound:
            continue
        if relaxed := relaxed_keys(whole, variant):
            raise ValueError(
                f"rules.{place} relaxes {', '.join(relaxed)} for a name, which tenants choose:"
                " add path to its match, with a folder first, as in /adapters/acme/**, or signer"
            )
        for other in range(place + 1, len(rules)):
            match = rules[other].match
            is_stricter = match.is_bound and match.adapter is None
            if is_stricter and (relaxed := relaxed_keys(variants[other], variant)):
                raise ValueError(
                    f"rules.{place} matches names, which tenants choose, and takes adapters out"
                    f" of rules.{other}, which is stricter in {', '.join(relaxed)}: put it"
                    f" after rules.{other}"
                )


def _keys(value: object) -> set[str]:
    return set(value) if isinstance(value, dict) else set()
