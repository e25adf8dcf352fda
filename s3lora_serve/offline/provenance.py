"""Provenance of a stripped adapter: an in-toto statement in its folder.

Source: in-toto Attestation Framework, Statement v1; SLSA Provenance v1.
"""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.admission.verdict import Verdict

PROVENANCE_NAME = "s3lora-provenance.json"
BUILD_TYPE = "urn:s3lora-serve:strip:v1"


def statement(verdict: Verdict, source: dict[str, str], target: Path) -> dict[str, Any]:
    """An in-toto statement of the files in `target`, the files they were made from, and the policy.

    `source` maps names of source files to their sha256 digests. The statement is unsigned: sign the
    folder or the statement.
    """
    files = [target / name for name in (WEIGHTS_NAME, CONFIG_NAME)]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [_resource(file.name, _sha256(file)) for file in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "scorer": verdict.scorer,
                    "policyDigest": verdict.policy_digest,
                    "strippedModules": list(verdict.stripped),
                    "removedTensors": list(verdict.removed),
                    "planDigest": verdict.plan_digest,
                    "transformedModules": list(verdict.transformed),
                    "projectedModules": list(verdict.projected),
                    "repairedModules": list(verdict.repaired),
                    "repair": verdict.repair and asdict(verdict.repair),
                },
                "resolvedDependencies": [_resource(*item) for item in sorted(source.items())],
            },
            "runDetails": {
                "builder": {
                    "id": "urn:s3lora-serve",
                    "version": {"s3lora-serve": version("s3lora-serve")},
                }
            },
        },
    }


def _resource(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
