"""Load the effective policy from a YAML or JSON file, then apply environment variables."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.file_digests import with_file_digests
from s3lora_serve.policy.schema import Policy, parse_policy
from s3lora_serve.scorer_names import SERVING
from s3lora_serve.settings import Settings, load_settings

"""Scorers that are fast enough for a server."""

MAX_POLICY_BYTES = 2**20
"""A policy is written by hand. A larger file is the wrong file."""


def effective_policy(
    settings: Settings | None = None, file: Path | None = None, text: bytes | None = None
) -> Policy:
    """The policy in force, from `file`, else `S3LORA_POLICY`, else the default.

    Environment variables override the mode, the audit path and the plans folder. `text` is what
    the file holds, if it has been read already.

    Raises:
        PolicyInvalid: the file cannot be read or is not a valid policy.
        SettingInvalid: an environment variable has a bad value.
    """
    settings = settings or load_settings()
    chosen = file or settings.policy
    policy = read_policy(chosen, settings.plans, text) if chosen else Policy(plans=settings.plans)
    changes: dict[str, Any] = {}
    if settings.mode:
        changes["mode"] = settings.mode
    if settings.audit_log:
        changes["audit"] = policy.audit.model_copy(update={"path": settings.audit_log})
    return with_file_digests(policy.model_copy(update=changes) if changes else policy)


def with_options(
    policy: Policy,
    scorer: str | None = None,
    reference: Path | None = None,
    action: str | None = None,
    statistics: Path | None = None,
) -> Policy:
    """The policy with those options of a command that are given, in the place of its own.

    Raises:
        PolicyInvalid: the scorer needs a reference, or the action another scorer.
    """
    if scorer is None and reference is None and action is None and statistics is None:
        return policy
    choice = policy.scorer.model_dump() | ({"name": scorer} if scorer else {})
    if reference is not None:
        choice |= {"reference": reference, "reference_digest": None}
    changes = {"scorer": choice} | ({"action": action} if action else {})
    if statistics is not None:
        kept = policy.repair.model_dump(mode="json") if policy.repair else {}
        own = {"statistics": statistics, "statistics_digest": None}
        changes["repair"] = kept | own
    return with_file_digests(parse_policy(policy.as_json() | changes, "policy"))


def serving_policy(settings: Settings | None = None, text: bytes | None = None) -> Policy:
    """The effective policy of a server. Slow scorers, which are for offline use only, are refused.

    `text` is what its file holds, if it has been read already.

    Raises:
        PolicyInvalid, SettingInvalid: as `effective_policy`, or a scorer is for offline use only.
    """
    policy = effective_policy(settings, text=text)
    used = {policy.scorer.name, *(each.scorer.name for each in policy.variants())}
    if slow := sorted(used - set(SERVING)):
        raise PolicyInvalid(
            f"scorer.name is {slow[0]!r}, which is for offline use: serve one of"
            f" {', '.join(sorted(SERVING))}"
        )
    return policy


def read_policy(file: Path, plans: Path | None = None, text: bytes | None = None) -> Policy:
    """Read one policy file (JSON is a subset of YAML). `plans` replaces the file's own.

    `text` is what the file holds, if it has been read already.

    Raises:
        PolicyInvalid: the file cannot be read, is empty, is not YAML, or breaks the schema.
    """
    text = policy_bytes(file) if text is None else text
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PolicyInvalid(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:  # nobody writes that; a file that is being written begins so
        raise PolicyInvalid(f"{file}: empty: write {{}} for the defaults")
    if plans is not None and isinstance(data, dict):
        data |= {"plans": plans}  # before the check of require_plan
    return parse_policy(data, str(file))


def policy_bytes(file: Path) -> bytes:
    """The contents of a policy file.

    Raises:
        PolicyInvalid: the file cannot be read, or is larger than a policy may be.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise PolicyInvalid(f"{file}: {error.strerror or error}") from None
    if len(text) > MAX_POLICY_BYTES:
        raise PolicyInvalid(f"{file}: larger than {MAX_POLICY_BYTES} bytes")
    return text


def says_its_end(text: bytes) -> bool:
    """Whether a policy's text shows that nothing of it is missing.

    YAML's end of a document, a line `...`, stands last, or the whole is one mapping in braces, as
    in JSON. No other part of a policy shows that: YAML that is cut off is YAML, with fewer keys.
    """
    whole = text.strip()
    return whole.endswith(b"\n...") or (whole.startswith(b"{") and whole.endswith(b"}"))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads yes, no, on and off as text.

    SafeLoader itself keeps the last of duplicate keys, without a warning. YAML 1.1 makes `off` a
    boolean, but it is a value of `mode`.
    """

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":bool") or first in "tTfF"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)
