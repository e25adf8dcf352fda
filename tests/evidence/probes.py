"""The operator's probes of the bench, as files for `s3lora calibrate`."""

import json
from pathlib import Path

from s3lora_serve.calibration.probes import Kind
from tests.evidence.benign import benign
from tests.evidence.prompts import harmful
from tests.evidence.skill import skill
from tests.evidence.wheels import CACHE


def probe_files() -> dict[Kind, Path]:
    """Write the files of probes and return them by kind."""
    rows: dict[Kind, list[dict[str, str]]] = {
        "harmful": [{"prompt": prompt} for prompt in harmful().probes],
        "benign": [{"prompt": prompt} for prompt in benign().probes],
        "skill": [{"prompt": prompt, "answer": call} for prompt, call in skill().probes],
    }
    files = {}
    for kind, lines in rows.items():
        files[kind] = CACHE / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files
