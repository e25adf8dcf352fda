"""The schema of the operator's policy: what is stripped, what is refused, and the limits.

Unknown keys are refused. Comments on the defaults give their origin; "ours" means that this project
chose the value.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.canonical import canonical_digest
from s3lora_serve.policy.globs import GlobText, glob_matches, selects
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.owners import Owner
from s3lora_serve.policy.relaxing import is_fixed_folder, relaxed_keys
from s3lora_serve.policy.section import Digest as Digest
from s3lora_serve.policy.section import Section
from s3lora_serve.policy.signatures import Attestations, Signatures
from s3lora_serve.settings import Mode

Fraction = Annotated[float, Field(ge=0, le=1)]

Normalization = Literal["two_sided", "row", "column", "equilibrated"]
Action = Literal["strip", "project"]

ALIGNMENT = ("safe-lora", "splora")
"""Scorers that compare modules with what alignment changed in the base model."""


class ScorerChoice(Section):
    """The index, with all parameters that influence it."""

    name: Literal["mas-svd", "svd", "spsvd", "dense", "safe-lora", "splora"] = "mas-svd"
    rank: Annotated[int, Field(ge=1)] | None = None  # M; None: min(r, m, n)
    normalization: Normalization = "two_sided"
    reference: Path | None = None  # an alignment reference, for safe-lora and splora
    reference_digest: Digest | None = None  # of that file; None: as it is when the policy is read

    @model_validator(mode="after")
    def _reference_where_it_is_used(self) -> Self:
        if self.by_alignment and self.reference is None:
            raise ValueError(f"{self.name} needs reference: a file of `s3lora reference make`")
        if self.reference is None and self.reference_digest is not None:
            raise ValueError("reference_digest is the digest of reference, which is not set")
        return self

    @property
    def by_alignment(self) -> bool:
        """Whether modules are compared with what alignment changed in the base model."""
        return self.name in ALIGNMENT

    def as_json(self) -> dict[str, Any]:
        """Name and parameters, in the form used in verdicts."""
        unused = {"name"} if self.by_alignment else {"name", "reference", "reference_digest"}
        return {"name": self.name, "parameters": self.model_dump(mode="json", exclude=unused)}


class Strip(Section):
    """The rule that picks the modules to strip: exactly one of the four."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    fraction: Fraction | None = None
    threshold: float | None = None  # in [0, 1], except for splora
    outliers: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.rule[1] is None:
            raise ValueError("expected exactly one of top_k, fraction, threshold, outliers")
        return self

    @property
    def rule(self) -> tuple[str, float]:
        """The chosen rule's name and its value."""
        [name] = self.model_fields_set
        return name, getattr(self, name)


class Limits(Section):
    """Bounds on what is read and admitted."""

    max_stripped_fraction: Fraction = 0.5  # ours: with more stripped, it is another adapter
    max_scaling: Annotated[float, Field(gt=0)] | None = 64  # ours: alpha 64 at r = 1
    max_norm_ratio: Annotated[float, Field(gt=0)] | None = None
    seconds: Annotated[float, Field(gt=0)] = 30  # far above any measured admission
    download_seconds: Annotated[float, Field(gt=0)] = 600  # hub ids, URLs: the largest at 4 MB/s
    load_seconds: Annotated[float, Field(gt=0)] = 120  # in workers; ours: max_bytes at 20 MB/s
    max_bytes: Annotated[int, Field(gt=0)] = 2 * 2**30  # r = 64 on a 70B model is 1.7 GB in bf16
    negative_alpha: bool = False  # ours: it takes away what was trained
    min_rank: Annotated[int, Field(ge=1)] = 1  # 2 refuses rank-1 modules, which cannot be ranked
    max_rank: Annotated[int, Field(ge=1)] = 256  # the largest in common use; vLLM allows up to 512
    formats: tuple[Literal["safetensors"], ...] = ("safetensors",)  # other formats run code to load
    roots: tuple[Path, ...] = ()


class Allowed(Section):
    """One adapter by its contents: weights and configuration, as verdicts name them."""

    digest: Digest
    config_digest: Digest

    @model_validator(mode="before")
    @classmethod
    def _weights_and_configuration(cls, data: object) -> object:
        if isinstance(data, str):
            raise ValueError(
                "a digest alone would admit the weights under any configuration, which scales"
                " them: list {digest: sha256:…, config_digest: sha256:…}, both from the adapter's"
                " verdict (s3lora scan --format json)"
            )
        return data


class Audit(Section):
    """The audit log of decisions."""

    path: Path | None = None
    max_bytes: Annotated[int, Field(gt=0)] = 100 * 2**20  # decisions of one day on a busy server
    keep: Annotated[int, Field(ge=0)] = 5
    required: bool = False


class Store(Section):
    """The limit on the stored copies on disk."""

    max_bytes: Annotated[int, Field(gt=0)] = 20 * 2**30  # ten adapters of the largest size


class Rates(Section):
    """How often each tenant may ask for loads, and be refused. None: as often as it likes."""

    loads_per_minute: Annotated[float, Field(gt=0)] | None = None
    refusals_per_minute: Annotated[float, Field(gt=0)] | None = None


class Experiments(Section):
    """Registrations with settings of their own, which `s3lora evaluate` asks for."""

    names: GlobText = "eval/*"  # ours; * does not cross /
    allow: frozenset[Literal["strip", "scorer", "action", "plan"]] = frozenset()
    ttl: Annotated[float, Field(gt=0)] | None = None  # seconds; None: until they are ended

    def claims(self, name: str) -> bool:
        """Whether a name is kept for experiments."""
        return glob_matches(self.names, name)


class Match(Section):
    """Globs that an adapter must match for a rule to apply. An unset glob matches everything."""

    adapter: GlobText | None = None
    path: GlobText | None = None
    base_model: GlobText | None = None

    @property
    def is_by_path(self) -> bool:
        """Whether a folder has to match, which a tenant cannot choose as a name can be chosen."""
        return self.path is not None and is_fixed_folder(self.path)


class Rule(BaseModel):
    """A match and the policy keys that it overrides, checked against the schema of `Policy`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    match: Match


_SERVERS = frozenset(
    [
        "rules",
        "mode",
        "audit",
        "store",
        "required",
        "plans",
        "experiments",
        "rates",
        "owners",
        "unguarded_frontends",
    ]
)
"""Keys that no rule may set."""

_NOT_DECIDING = _SERVERS | {"signatures", "attestations"}
"""Keys that change no decision of the index on an adapter."""


class Policy(Section):
    """The effective policy. It is immutable, and the digest of its canonical JSON identifies it."""

    mode: Mode = "enforce"
    scorer: ScorerChoice = ScorerChoice()
    modules: tuple[GlobText, ...] = ("*",)
    action: Action = "strip"  # what happens to the modules that `strip` picks
    strip: Strip = Strip(top_k=10)  # τ = 10: arXiv 2508.15068, sweep over {0, 5, 10, 15, 20}
    # Share of Σ‖ΔW‖_F². Ours: under a tenth of the smallest share of any module of an adapter
    # trained with AdamW, tests/evidence/SHARES.md
    negligible: Annotated[float, Field(ge=0, lt=1)] = 2e-5
    limits: Limits = Limits()
    deny: frozenset[Digest] = frozenset()
    allow: frozenset[Allowed] = frozenset()
    on_uninformative: Literal["reject", "admit"] = "reject"
    on_unscorable: Literal["reject", "admit", "strip"] = "reject"
    audit: Audit = Audit()
    store: Store = Store()
    rates: Rates = Rates()
    required: bool = False
    unguarded_frontends: Literal["refuse", "allow"] = "refuse"  # ours: nothing starts unguarded
    plans: Path | None = None  # folder of plans; None: the index chooses for every adapter
    require_plan: bool = False
    signatures: Signatures = Signatures()
    attestations: Attestations = Attestations()
    experiments: Experiments | None = None  # None: there are none, and no name is kept for them
    owners: tuple[Owner, ...] = ()  # (): names are whose registers them first
    rules: tuple[Rule, ...] = ()

    @model_validator(mode="after")
    def _required_plans_have_a_folder(self) -> Self:
        if self.require_plan and self.plans is None:
            raise ValueError("require_plan: true needs plans, or S3LORA_PLANS: a folder of plans")
        return self

    @model_validator(mode="after")
    def _action_and_threshold_suit_the_scorer(self) -> Self:
        if self.action == "project" and self.scorer.name != "safe-lora":
            raise ValueError(f"action: project needs scorer.name safe-lora, not {self.scorer.name}")
        bound = self.strip.threshold
        if bound is not None and self.scorer.name != "splora" and not 0 <= bound <= 1:
            raise ValueError(f"strip.threshold is {bound:g}, outside of [0, 1]")
        return self

    @model_validator(mode="after")
    def _rules_are_policies(self) -> Self:
        for place, rule in enumerate(self.rules):
            try:
                self._overridden(rule)
            except ValidationError as error:
                raise ValueError(f"rules.{place}: {_explain(error.errors())}") from None
            except ValueError as error:
                raise ValueError(f"rules.{place}: {error}") from None
        return self

    @model_validator(mode="after")
    def _names_relax_nothing(self) -> Self:
        whole = self.as_json()
        variants = [variant.as_json() for variant in self.variants()]
        for place, (rule, variant) in enumerate(zip(self.rules, variants, strict=True)):
            if rule.match.is_by_path:
                continue
            if relaxed := relaxed_keys(whole, variant):
                raise ValueError(
                    f"rules.{place} relaxes {', '.join(relaxed)} for a name, which tenants choose:"
                    " add path to its match, with a folder first, as in /adapters/acme/**"
                )
            for other in range(place + 1, len(self.rules)):
                match = self.rules[other].match
                by_path = match.is_by_path and match.adapter is None
                if by_path and (relaxed := relaxed_keys(variants[other], variant)):
                    raise ValueError(
                        f"rules.{place} matches names, which tenants choose, and takes adapters out"
                        f" of rules.{other}, which is stricter in {', '.join(relaxed)}: put it"
                        f" after rules.{other}"
                    )
        return self

    @model_validator(mode="after")
    def _owners_signers_are_verified(self) -> Self:
        if not self.signatures.anyone and any(owner.signers for owner in self.owners):
            raise ValueError("owners.signers needs signatures with keys, certificates, identities")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return canonical_digest(self.as_json())

    @property
    def deciding_digest(self) -> str:
        """sha256 of the canonical JSON of what decides on an adapter; paths of a machine do not.

        It is meant for the policy of one adapter, rules applied.
        """
        data = {key: value for key, value in self.as_json().items() if key not in _NOT_DECIDING}
        data["scorer"] = data["scorer"] | {"reference": None}  # its digest decides
        data["limits"] = data["limits"] | {"roots": []}
        return canonical_digest(data)

    def as_json(self) -> dict[str, Any]:
        """The effective policy as plain data. Sets are sorted: equal policies have equal JSON."""
        data = self.model_dump(mode="json", exclude={"strip"})
        data["strip"] = dict([self.strip.rule])
        data["deny"] = sorted(self.deny)
        data["allow"].sort(key=lambda listed: (listed["digest"], listed["config_digest"]))
        if self.experiments is not None:
            data["experiments"]["allow"] = sorted(self.experiments.allow)
        return data

    def for_adapter(self, name: str, path: str, base_model: str | None) -> "Policy":
        """The policy with the first matching rule applied.

        The rule's `strip` replaces the policy's as a whole; other mappings are merged.

        Raises:
            TooLong: name or path are longer than any may be.
        """
        check_lengths(name, path)
        facts = {"adapter": name, "path": path, "base_model": base_model or ""}
        for rule in self.rules:
            globs = rule.match.model_dump(exclude_none=True)
            if all(glob_matches(pattern, facts[key]) for key, pattern in globs.items()):
                return self._overridden(rule)
        return self

    def variants(self) -> list["Policy"]:
        """The policy with each rule applied alone."""
        return [self._overridden(rule) for rule in self.rules]

    def selects(self, module: str) -> bool:
        """Whether `modules` selects a module by its projection or its full name."""
        return selects(self.modules, module)

    def _overridden(self, rule: Rule) -> "Policy":
        overrides = rule.model_extra or {}
        if unfit := sorted(_SERVERS & set(overrides)):
            raise ValueError(f"{', '.join(unfit)} cannot be set by a rule: they are the server's")
        scorer = overrides.get("scorer")
        if isinstance(scorer, dict) and {"reference", "reference_digest"} & scorer.keys():
            raise ValueError("scorer.reference cannot be set by a rule: it is the server's")
        data = self.as_json() | {"rules": ()}
        for key, value in overrides.items():
            merge = key != "strip" and isinstance(value, dict) and isinstance(data.get(key), dict)
            data[key] = data[key] | value if merge else value
        return Policy.model_validate(data)


def parse_policy(data: object, source: str) -> Policy:
    """Check plain data (from YAML or JSON) against the schema.

    Raises:
        PolicyInvalid: keys are unknown or values are not allowed; the message names them all.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PolicyInvalid(f"{source}: expected a mapping, got {type(data).__name__}")
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        raise PolicyInvalid(f"{source}: {_explain(error.errors())}") from None


def _explain(problems: Sequence[Any]) -> str:
    lines = []
    for problem in problems:
        where = ".".join(str(part) for part in problem["loc"]) or "policy"
        shown = repr(problem["input"])
        lines.append(f"{where}: {problem['msg']} (got {shown[:80]})")
    return "; ".join(lines)
