"""The one catalogue of refusals: what was wrong, the offending value, what to do, a stable code.

Codes are `S3LORA-NNN` and never change meaning: 1xx the adapter's files, 2xx the policy's word,
3xx the served model, 4xx the scorer, 9xx the installation (no adapter is to blame).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from s3lora_serve.printable import printable


class S3LoRAError(Exception):
    """Base of every error with a code; its text is `S3LORA-NNN: what was wrong. What to do.`."""

    code: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self, problem: str) -> None:
        self.problem = printable(problem)  # it may quote what a tenant chose
        super().__init__(f"{self.code}: {self.message}")

    @property
    def message(self) -> str:
        """What was wrong and what to do, without the code."""
        return f"{self.problem}. {self.remedy}"


class AdapterRejected(S3LoRAError):
    """An adapter is not admitted. One subclass per cause; its docstring says what that is."""

    passes: ClassVar[bool] = False
    """Whether the same adapter may be admitted later, under the same policy."""


class NotAnAdapter(AdapterRejected):
    """The path is not a folder that holds adapter_config.json and adapter_model.safetensors."""

    code = "S3LORA-101"
    remedy = "Point to a folder that PEFT's save_pretrained wrote."


class FormatNotAllowed(AdapterRejected):
    """The weights are in a format that runs code when it is read, such as pickle."""

    code = "S3LORA-102"
    remedy = "Save the adapter as safetensors (PEFT's default)."


class ConfigInvalid(AdapterRejected):
    """adapter_config.json is not JSON, is not a LoRA's, or has a value out of its range."""

    code = "S3LORA-103"
    remedy = "Save the adapter again with PEFT; adapter_config.json must be what PEFT writes."


class WeightsUnreadable(AdapterRejected):
    """The weights' header or data is not what the safetensors format defines."""

    code = "S3LORA-104"
    remedy = "The file is damaged or is not safetensors: upload it again."


class ChangedWhileCopying(AdapterRejected):
    """A file of the adapter changed while it was copied."""

    code = "S3LORA-105"
    remedy = "Register the adapter again once nothing writes to its folder."


class OutsideRoots(AdapterRejected):
    """The adapter lies outside the folders that limits.roots or a resolver allows."""

    code = "S3LORA-106"
    remedy = "Move the adapter under one of the policy's limits.roots, or the resolver's folder."


class ShapesDoNotFit(AdapterRejected):
    """The factors of a module are not (r, in) and (out, r) with its configured rank."""

    code = "S3LORA-107"
    remedy = "lora_A must be (r, in) and lora_B (out, r), with the r of adapter_config.json."


class PartnerMissing(AdapterRejected):
    """A module lacks its lora_A or its lora_B, or the adapter has no module."""

    code = "S3LORA-108"
    remedy = "Every module needs both its lora_A and its lora_B."


class NotFinite(AdapterRejected):
    """Entries are NaN or infinite as served: cast to the server's dtype and scaled."""

    code = "S3LORA-109"
    remedy = "The training run diverged: use an earlier checkpoint."


class Unscorable(AdapterRejected):
    """A part of the adapter is not a plain LoRA, so its effect cannot be scored."""

    code = "S3LORA-110"
    remedy = "Train a plain LoRA on linear modules: the index is not defined for anything else."


class ModuleTwice(AdapterRejected):
    """Two tensors map to one module, so it is undefined which one is served."""

    code = "S3LORA-111"
    remedy = "Two tensors claim one module: save the adapter again with PEFT."


class Cancels(AdapterRejected):
    """The factors of a module cancel beyond the precision in which they are served."""

    code = "S3LORA-112"
    remedy = "The served update would be rounding noise: save smaller factors."


class StoredInEightBits(AdapterRejected):
    """The policy changes a factor that is stored in 8 bits, which cannot hold the changed one."""

    code = "S3LORA-113"
    remedy = "Save the adapter in bfloat16, so that a plan, repair or projection can change it."


class InitialisedOnBase(AdapterRejected):
    """The adapter's initialisation changes the base model when PEFT loads it, and vLLM does not."""

    code = "S3LORA-114"
    remedy = "Convert it to a plain LoRA: PEFT's path_initial_model_for_weight_conversion."


class OverLimit(AdapterRejected):
    """A rank, scaling, norm, size or number is over a limit of the policy or of the gate."""

    code = "S3LORA-201"
    remedy = "Shrink the adapter, or raise the limit in the policy."


class Denied(AdapterRejected):
    """The adapter's digest is on the policy's deny list."""

    code = "S3LORA-202"
    remedy = "The operator denied this digest."


class TooManySharp(AdapterRejected):
    """The strip rule picks more modules than limits.max_stripped_fraction allows."""

    code = "S3LORA-203"
    remedy = "Retrain the adapter, or change strip or limits.max_stripped_fraction in the policy."


class Uninformative(AdapterRejected):
    """All modules have nearly the same relative index, so the index ranks none of them."""

    code = "S3LORA-204"
    remedy = "The index cannot tell its modules apart; on_uninformative: admit admits it."


class Unrankable(AdapterRejected):
    """Fewer than two modules have a relative index and are not negligible."""

    code = "S3LORA-205"
    remedy = "There is nothing to rank; on_uninformative: admit admits it."


class NoEffect(AdapterRejected):
    """Every update of the adapter is 0, so it serves the base model."""

    code = "S3LORA-226"
    remedy = "Save it after training, with a nonzero alpha; on_uninformative: admit serves it."


class NothingSelected(AdapterRejected):
    """The policy's modules select none of the adapter's, so nothing would be scored."""

    code = "S3LORA-206"
    remedy = "Widen modules in the policy: nothing unscored is admitted."


class PlanMissing(AdapterRejected):
    """The policy requires a plan, and its plans folder has none for the adapter."""

    code = "S3LORA-207"
    remedy = "Put a plan for this digest into the policy's plans folder, or unset require_plan."


class PlanInvalid(AdapterRejected):
    """The plan does not validate, is not this adapter's, or can be written by others."""

    code = "S3LORA-208"
    remedy = "Mend or remove the plan; docs/reference.md has its schema and its folder's rules."
    passes = True


class ReferenceUnfit(AdapterRejected):
    """The alignment reference lacks a module of the adapter, or has it in another shape."""

    code = "S3LORA-209"
    remedy = "Make a reference of all modules that the policy selects: s3lora reference make."


class RepairImpossible(AdapterRejected):
    """The policy's statistics lack a module of the adapter, or repairing it breaks a bound."""

    code = "S3LORA-225"
    remedy = "Make statistics of the served model, or let a rule turn repair off for this adapter."


class NameReserved(AdapterRejected):
    """The name is one of the policy's names for experiments, and this is none; or the reverse."""

    code = "S3LORA-210"
    remedy = "Take another name; experiments.names in the policy says which are for experiments."


class ExperimentClosed(AdapterRejected):
    """The policy allows no experiments, none with this setting, or none for longer."""

    code = "S3LORA-211"
    remedy = "Open experiments in the policy of this server: names, what they may set, ttl."


class Unsigned(AdapterRejected):
    """The policy requires a signature, and the adapter's folder holds none."""

    code = "S3LORA-212"
    remedy = "Sign the folder with model-signing, by a signer that the policy names."


class SignerUntrusted(AdapterRejected):
    """The signature cannot be read, or no signer that the policy names made it."""

    code = "S3LORA-213"
    remedy = "Have it signed by a signer that the policy names, or add the signer to the policy."


class SignedOtherwise(AdapterRejected):
    """What a trusted signer signed is not what the folder holds, or leaves out its weights."""

    code = "S3LORA-214"
    remedy = "The files changed after they were signed: fetch them again, or sign them again."


class FilesUnsigned(AdapterRejected):
    """The folder holds files that its signature does not cover."""

    code = "S3LORA-215"
    remedy = "Remove the files, or sign the folder again with them."


class AttestationMissing(AdapterRejected):
    """The policy requires an attested verdict, and the adapter's folder holds none."""

    code = "S3LORA-216"
    remedy = "Put what s3lora attest writes into the adapter's folder."


class AttestationUntrusted(AdapterRejected):
    """The attestation cannot be read, was changed, or is signed by no key of the policy."""

    code = "S3LORA-217"
    remedy = "Attest the adapter again with a key whose public part the policy names."


class AttestedOther(AdapterRejected):
    """The attestation is about other weights or another configuration."""

    code = "S3LORA-218"
    remedy = "Attest this adapter: the attestation is another one's, or the files changed since."


class AttestationOutdated(AdapterRejected):
    """The attested verdict is too old, or was made under another policy."""

    code = "S3LORA-219"
    remedy = "Attest the adapter again under the policy in force."


class TooLong(AdapterRejected):
    """The adapter's name has over 256 characters, or its path over 4096."""

    code = "S3LORA-221"
    remedy = "Register the adapter under a shorter name, from a shorter path."


class NotTheOwner(AdapterRejected):
    """The name has an owner in the policy, and path, signer or API key are not the owner's."""

    code = "S3LORA-222"
    remedy = "Take another name, or have the policy's owners list the path, signer or key."


class NegativeAlpha(AdapterRejected):
    """A module's alpha is negative, which takes away what was trained, and is not allowed."""

    code = "S3LORA-223"
    remedy = "Save it with a positive alpha, list it in allow, or set limits.negative_alpha."


class NotText(AdapterRejected):
    """The adapter's name or path holds lone surrogates, which are no text."""

    code = "S3LORA-224"
    remedy = "Take a name and a path that UTF-8 can encode: vLLM's engine gets no others."


class DoesNotFitModel(AdapterRejected):
    """A module is not one of the served model's, or has another shape or scaling there."""

    code = "S3LORA-301"
    remedy = "Register it on a server of the model it was trained for."


class NothingPlaced(AdapterRejected):
    """No module of the adapter is one that the served model can have a LoRA on."""

    code = "S3LORA-303"
    remedy = "It would serve the base model: save it under the served model's module names."


class RefusedByVLLM(AdapterRejected):
    """The gate admits the adapter, but vLLM does not load it."""

    code = "S3LORA-302"
    remedy = "vLLM itself does not load this adapter; its own message is above."


class GateFailed(AdapterRejected):
    """The gate failed, with an error that the adapter did not cause."""

    code = "S3LORA-401"
    remedy = "The gate itself failed, and nothing unscored is admitted; see the server's log."
    passes = True


class DeadlinePassed(AdapterRejected):
    """The decision or the download took longer than the policy allows."""

    code = "S3LORA-402"
    remedy = "Raise that limit in the policy, or give the server more cores."
    passes = True


class StoreDamaged(AdapterRejected):
    """The stored copy is missing, or no longer has the digest of its admission."""

    code = "S3LORA-403"
    remedy = "Register the adapter again: its stored copy is missing or damaged."
    passes = True


class AuditFailed(AdapterRejected):
    """The decision could not be written to the audit log, which the policy requires."""

    code = "S3LORA-404"
    remedy = "The policy has audit.required: make the audit log writable again."
    passes = True


class StoreFull(AdapterRejected):
    """There is no room for the stored copy beside the served ones."""

    code = "S3LORA-405"
    remedy = "Unload adapters that are no longer needed, or raise store.max_bytes in the policy."
    passes = True


class Refused(AdapterRejected):
    """A refusal for the reason that a verdict has."""

    def __init__(self, reason: "Reason") -> None:
        self.reason = reason
        Exception.__init__(self, str(reason))

    def __reduce__(self) -> tuple[type["Refused"], tuple["Reason"]]:
        return Refused, (self.reason,)


class LoadPostponed(S3LoRAError):
    """A load is turned away before the adapter is looked at, and may be tried again later."""

    def __init__(self, problem: str, retry_seconds: int = 10) -> None:
        super().__init__(problem)
        self.retry_seconds = retry_seconds


class RateExceeded(LoadPostponed):
    """A tenant asked for more loads, or was refused more often, than the policy's rates allow."""

    code = "S3LORA-220"
    remedy = "Try again after the seconds that Retry-After names, or raise rates in the policy."


class QueueFull(LoadPostponed):
    """Too many loads wait, or one waited too long for its turn."""

    code = "S3LORA-406"
    remedy = "Try again after the seconds that Retry-After names."


class PolicyInvalid(S3LoRAError):
    """The policy is not valid, or cannot be read."""

    code = "S3LORA-901"
    remedy = "Fix the policy; docs/reference.md lists all keys."


class PlansInvalid(PolicyInvalid):
    """The policy's folder of plans cannot be read, or others can write in it."""


class SettingInvalid(S3LoRAError):
    """An environment variable has a value that is not allowed."""

    code = "S3LORA-902"
    remedy = "Fix or unset the variable; docs/reference.md lists them."


class StorageFailed(S3LoRAError):
    """Storage cannot be listed, or a URL leads to nothing."""

    code = "S3LORA-904"
    remedy = (
        "Check the URL, and the settings of its fsspec backend: credentials, endpoint, whether it"
        " is installed."
    )


class ContractBroken(S3LoRAError):
    """vLLM lacks a name or signature that the gate relies on."""

    code = "S3LORA-903"
    remedy = (
        "Install a vLLM version that the README lists as supported; nothing is served unguarded."
    )


class ProbesInvalid(S3LoRAError):
    """A file of probes is not JSON Lines with the keys that its kind needs, or holds too few."""

    code = "S3LORA-905"
    remedy = 'Write one JSON object a line: {"prompt": …}, and "answer" for probes of skill.'


class BaseModelUnfit(S3LoRAError):
    """The base model of a calibration cannot be loaded, or does not fit in memory."""

    code = "S3LORA-906"
    remedy = "Name the folder of a base model with safetensors weights that fits in memory."


class BaseUnaligned(S3LoRAError):
    """The base model itself complies with harmful probes, so stripping can restore no refusals."""

    code = "S3LORA-907"
    remedy = "Calibrate on an aligned base model, or on probes that it refuses."


class TargetMissed(S3LoRAError):
    """No setting of the gates reaches the attack success rate that was asked for."""

    code = "S3LORA-908"
    remedy = (
        "The adapter stays under repair. Give --skill, more probes or steps, or raise --max-asr;"
        " a plan of --accept-best takes the place of repair."
    )


class ReferenceInvalid(S3LoRAError):
    """A file is not an alignment reference, or its numbers cannot be those of one."""

    code = "S3LORA-909"
    remedy = "Make it again with s3lora reference make."


class CheckpointUnfit(S3LoRAError):
    """No alignment reference can be made of two checkpoints."""

    code = "S3LORA-910"
    remedy = "Name the folders of a base model and of the model that was aligned from it."


class StatisticsInvalid(S3LoRAError):
    """A file holds no statistics of a base model's inputs, or its numbers cannot be theirs."""

    code = "S3LORA-913"
    remedy = "Make it again with s3lora statistics make."


class ServerFailed(S3LoRAError):
    """A server of a planner does not answer, is not guarded, or refuses what it is asked."""

    code = "S3LORA-914"
    remedy = "Check the URL, its API key, and that the server loads adapters at run time."


class EvaluationFailed(S3LoRAError):
    """An evaluation cannot begin, or a task of it failed."""

    code = "S3LORA-911"
    remedy = (
        "Check server, key, policy and tasks; --resume goes on with the settings that are left."
    )


class FrontEndUnguarded(S3LoRAError):
    """vLLM's front end is one in which the gate does not decide on registrations."""

    code = "S3LORA-912"
    remedy = "Serve with vLLM's Python API server, or set unguarded_frontends: allow in the policy."


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an adapter was rejected, as verdicts carry it."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @classmethod
    def from_json(cls, data: dict[str, str] | None) -> "Reason | None":
        return None if data is None else cls(data["code"], data["message"])

    @classmethod
    def of(cls, error: S3LoRAError) -> "Reason":
        return error.reason if isinstance(error, Refused) else cls(error.code, error.message)

    @property
    def passes(self) -> bool:
        """Whether the same adapter may be admitted later, under the same policy."""
        return any(cause.passes for cause in rejections() if cause.code == self.code)

    @property
    def is_postponed(self) -> bool:
        """Whether a load was turned away before the adapter was looked at."""
        return any(cause.code == self.code for cause in LoadPostponed.__subclasses__())


def rejections() -> tuple[type[AdapterRejected], ...]:
    """Every cause for which an adapter can be refused, by code."""
    causes = (cause for cause in AdapterRejected.__subclasses__() if hasattr(cause, "code"))
    return tuple(sorted(causes, key=lambda cause: cause.code))


def rejection_codes() -> tuple[str, ...]:
    """Every code that an adapter can be refused with: a closed set, fit for labels."""
    return tuple(cause.code for cause in rejections())


def meanings() -> dict[str, str]:
    """Each code's cause in a few words: its name, in lower case."""
    words = {cause.code: re.sub(r"(?<!^)(?=[A-Z])", " ", cause.__name__) for cause in rejections()}
    return {code: name.lower() for code, name in words.items()}
