"""The operator's probes of the bench, as files for `s3lora calibrate` and `s3lora statistics`."""

import json
from pathlib import Path

from s3lora_serve.lab.base_model.probes import Kind
from tests.runs.evidence.benign import benign
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.skill import SkillName, skill
from tests.runs.evidence.wheels import CACHE


def probe_files(name: SkillName) -> dict[Kind, Path]:
    """Write the files of probes for adapters of a skill, and return them by kind."""
    return {
        "harmful": _written("harmful", [{"prompt": prompt} for prompt in harmful().probes]),
        "benign": _written("benign", [{"prompt": prompt} for prompt in benign().probes]),
        "skill": _written(
            f"skill {name}",
            [{"prompt": prompt, "answer": answer} for prompt, answer in skill(name).probes],
        ),
    }


def request_file(name: SkillName) -> Path:
    """Write requests of a skill without their answers, and return the file."""
    return _written(f"requests {name}", [{"prompt": prompt} for prompt, _ in skill(name).probes])


def _written(name: str, rows: list[dict[str, str]]) -> Path:
    file = CACHE / f"{name.replace(' ', '-')}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
