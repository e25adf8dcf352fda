"""Verdicts that tests of telemetry report."""

from dataclasses import replace
from typing import Any

from s3lora_serve.admission.verdict import Decision, Verdict


def admitted(**changes: Any) -> Verdict:
    """The verdict on an admitted adapter without modules, with some fields changed."""
    plain = Verdict(
        path="/adapters/acme",
        name="acme",
        digest="sha256:" + "d" * 64,
        config_digest=None,
        decision=Decision.ADMITTED,
        reason=None,
        uninformative=False,
        mode="enforce",
        scorer={"name": "mas-svd", "parameters": {"rank": None}},
        policy_digest="sha256:" + "e" * 64,
    )
    return replace(plain, **changes)
