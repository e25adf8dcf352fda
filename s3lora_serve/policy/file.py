"""Where the effective policy comes from: a YAML or JSON file, then the environment over it."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.schema import Policy, ScorerChoice, parse_policy
from s3lora_serve.settings import Settings, load_settings

SERVING = ScorerChoice().name
"""The one scorer that serves is the default."""

MAX_POLICY_BYTES = 2**20
"""A policy is written by hand; a larger file is the wrong file."""


def effective_policy(settings: Settings | None = None, file: Path | None = None) -> Policy:
    """The policy in force: `file`, else `S3LORA_POLICY`, else the default; environment over it.

    Raises:
        PolicyInvalid: the file cannot be read or is not a valid policy.
        SettingInvalid: an environment variable has a bad value.
    """
    settings = settings or load_settings()
    chosen = file or settings.policy
    policy = read_policy(chosen) if chosen else Policy()
    changes: dict[str, Any] = {}
    if settings.mode:
        changes["mode"] = settings.mode
    if settings.audit_log:
        changes["audit"] = policy.audit.model_copy(update={"path": settings.audit_log})
    return policy.model_copy(update=changes) if changes else policy


def serving_policy(settings: Settings | None = None) -> Policy:
    """The effective policy of a server, which scores with nothing slow.

    Raises:
        PolicyInvalid, SettingInvalid: as `effective_policy`; the scorer is for offline use only.
    """
    policy = effective_policy(settings)
    used = {policy.scorer.name, *(each.scorer.name for each in policy.variants())}
    if slow := sorted(used - {SERVING}):
        raise PolicyInvalid(
            f"scorer.name is {slow[0]!r}, which is for offline use: serve {SERVING}"
        )
    return policy


def read_policy(file: Path) -> Policy:
    """Read one policy file (JSON is a subset of YAML).

    Raises:
        PolicyInvalid: the file cannot be read, is not YAML, or breaks the schema.
    """
    text = policy_bytes(file)
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader, see below
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PolicyInvalid(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    return parse_policy(data, str(file))


def policy_bytes(file: Path) -> bytes:
    """The contents of a policy file.

    Raises:
        PolicyInvalid: it cannot be read, or is too large to be one.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise PolicyInvalid(f"{file}: {error.strerror or error}") from None
    if len(text) > MAX_POLICY_BYTES:
        raise PolicyInvalid(f"{file}: larger than {MAX_POLICY_BYTES} bytes")
    return text


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (the second would silently win), and to which
    `off` is a word: YAML 1.1 makes a boolean of it, and `mode: off` is a policy."""

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
