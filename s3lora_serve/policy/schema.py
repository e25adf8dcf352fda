"""The schema of the operator's policy: what is stripped, what is refused, and the limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.canonical import canonical_digest
from s3lora_serve.policy.globs import GlobText, selects
from s3lora_serve.policy.lengths import check_lengths
from s3lora_serve.policy.limits import Allowed, Limits
from s3lora_serve.policy.method import Action, RepairChoice, ScorerChoice, Strip
from s3lora_serve.policy.owners import Owner
from s3lora_serve.policy.rules import SERVERS, Rule, check_keys, check_names_relax_nothing
from s3lora_serve.policy.section import Digest, Section
from s3lora_serve.policy.server import Audit, ExperimentsPolicy, Rates, Store
from s3lora_serve.policy.signatures import Attestations, Signatures
from s3lora_serve.scorer_names import SAFE_LORA, SPLORA
from s3lora_serve.settings import Mode

_NOT_DECIDING = SERVERS | {"signatures", "attestations"}
"""Keys that change no decision of the index on an adapter."""


class Policy(Section):
    """The effective policy. It is immutable, and the digest of its canonical JSON identifies it."""

    mode: Mode = "enforce"
    """`audit` decides and reports, and strips and refuses nothing: an adapter that cannot be scored
    or does not fit the model is loaded without effect. `off`: vLLM is unchanged, and
    `/s3lora/status` answers 503."""
    scorer: ScorerChoice = ScorerChoice()
    modules: tuple[GlobText, ...] = ("*",)
    """Globs on projection or full name of the modules that are scored. The paper scores `q_proj`,
    `k_proj`, `v_proj` and `o_proj`."""
    action: Action = "strip"
    """What happens to the modules that `strip` picks. `project`, with `safe-lora`: they are served
    with B' = C·B ([alignment](alignment.md))."""
    repair: RepairChoice | None = None
    """What the index does not strip is [repaired](repair.md); null: nothing is."""
    strip: Strip = Strip(top_k=10)  # τ = 10: arXiv 2508.15068, sweep over {0, 5, 10, 15, 20}
    # Ours: under a tenth of the smallest share of any module of an adapter trained with AdamW,
    # tests/runs/evidence/SHARES.md
    negligible: Annotated[float, Field(ge=0, lt=1)] = 2e-5
    """Share of Σ‖ΔW‖_F²: smaller modules do not count for `strip` and `max_stripped_fraction`, and
    are stripped if they are as sharp as the modules that are. Adapters of thousands of modules
    (experts) need less: 1e-6, by a rule."""
    limits: Limits = Limits()
    deny: frozenset[Digest] = frozenset()
    """`sha256:…` of adapter_model.safetensors: always refused."""
    allow: frozenset[Allowed] = frozenset()
    """`{digest: sha256:…, config_digest: sha256:…}`, both as in verdicts: admitted unstripped and
    unrepaired, plan or not. Limits still apply."""
    on_uninformative: Literal["reject", "admit"] = "reject"
    """The index does not tell the modules apart, or there are fewer than two to rank."""
    on_unscorable: Literal["reject", "admit", "strip"] = "reject"
    """Embedding LoRA, `modules_to_save`, DoRA, bias. `admit` serves them unscored (vLLM itself
    refuses the last two), `strip` removes the first two and refuses the others."""
    audit: Audit = Audit()
    store: Store = Store()
    rates: Rates = Rates()
    required: bool = False
    """Every worker must import the gate, or the server does not start."""
    unguarded_frontends: Literal["refuse", "allow"] = "refuse"  # ours: nothing starts unguarded
    """`allow`: start also behind vLLM's Rust front end and its gRPC server, where the workers alone
    decide ([threat model](threat-model.md#front-ends))."""
    plans: Path | None = None
    """Folder of [plans](#plans); null: the index chooses for every adapter."""
    require_plan: bool = False
    """An adapter without a plan is refused (S3LORA-207); needs `plans`."""
    signatures: Signatures = Signatures()
    attestations: Attestations = Attestations()
    experiments: ExperimentsPolicy | None = None
    """What `s3lora evaluate` may set ([evaluation](evaluation.md)); null: there are no experiments,
    and no name is kept for them."""
    owners: tuple[Owner, ...] = ()
    """Who may load and unload under a name, below; none: names are whose registers them first."""
    rules: tuple[Rule, ...] = ()
    """The first that matches an adapter wins; its `strip` replaces the policy's whole, other keys
    merge."""

    @model_validator(mode="after")
    def _required_plans_have_a_folder(self) -> Self:
        if self.require_plan and self.plans is None:
            raise ValueError("require_plan: true needs plans, or S3LORA_PLANS: a folder of plans")
        return self

    @model_validator(mode="after")
    def _action_and_threshold_suit_the_scorer(self) -> Self:
        if self.action == "project" and self.scorer.name != SAFE_LORA:
            raise ValueError(f"action: project needs scorer.name safe-lora, not {self.scorer.name}")
        if self.action == "project" and self.repair is not None:
            raise ValueError("action: project changes B, repair changes A: choose one of them")
        bound = self.strip.threshold
        if bound is not None and self.scorer.name != SPLORA and not 0 <= bound <= 1:
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
        variants = [variant.as_json() for variant in self.variants()]
        check_names_relax_nothing(self.rules, self.as_json(), variants)
        return self

    @model_validator(mode="after")
    def _signers_are_verified(self) -> Self:
        used = {
            "owners.signers": any(owner.signers for owner in self.owners),
            "match.signer": any(rule.match.signer for rule in self.rules),
        }
        for key, is_used in used.items():
            if is_used and not self.signatures.anyone:
                raise ValueError(f"{key} needs signatures with keys, certificates or identities")
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
        if data["repair"] is not None:
            data["repair"] = data["repair"] | {"statistics": None}
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

    def for_adapter(
        self, name: str, path: str, base_model: str | None, signer: str | None = None
    ) -> "Policy":
        """The policy with the first matching rule applied.

        The rule's `strip` replaces the policy's as a whole; other mappings are merged. `signer` is
        the id of the verified signer; before one is verified, no rule matches by signer.

        Raises:
            TooLong: name or path are longer than any may be.
        """
        check_lengths(name, path)
        for rule in self.rules:
            if rule.match.holds(name, path, base_model, signer):
                return self._overridden(rule)
        return self

    def variants(self) -> list["Policy"]:
        """The policy with each rule applied alone."""
        return [self._overridden(rule) for rule in self.rules]

    def selects(self, module: str) -> bool:
        """Whether `modules` selects a module by its projection or its full name."""
        return selects(self.modules, module)

    def _overridden(self, rule: Rule) -> "Policy":
        check_keys(rule)
        data = self.as_json() | {"rules": ()}
        for key, value in (rule.model_extra or {}).items():
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
