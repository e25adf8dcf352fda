"""`s3lora evaluate` on the bench's model: a sweep over a guarded vLLM by inspect_ai."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.runs.evidence.adapters import Subject, make_adapter
from tests.runs.evidence.base_model import Progress, aligned_base
from tests.runs.evidence.measuring import kept
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.served import DTYPE_OPTION
from tests.runs.evidence.skill import skill
from tests.runs.evidence.stages import RESULTS
from tests.runs.evidence.wheels import CACHE
from tests.support.server import OPEN_LOADING, Server, base_environment

POLICY = 'experiments: {names: "eval/*", allow: [strip, plan]}\n'
COUNTS = "0,10"


def sweep_result(subject: Subject, progress: Progress) -> Any:
    """The sweep's file: the whole adapter, the default strip count, and the calibrated plan."""
    base = aligned_base(subject.base, progress)
    folder = make_adapter(subject, base, progress).absolute()

    def made() -> Any:
        plan = (CACHE / "plans" / f"{folder.name}.json").absolute()
        with tempfile.TemporaryDirectory() as parent:
            place = Path(parent)
            (place / "policy.yaml").write_text(POLICY)
            _write(place / "harmful.jsonl", ({"prompt": text} for text in harmful().test))
            calls = ({"prompt": text, "answer": call} for text, call in skill("tool calls").test)
            _write(place / "calls.jsonl", calls)
            environment = OPEN_LOADING | {"S3LORA_POLICY": str(place / "policy.yaml")}
            log = CACHE / f"sweep-{folder.name}.log"
            with Server(
                base.absolute(), log, DTYPE_OPTION, environment, one_process=False
            ) as server:
                command = [
                    sys.executable, "-m", "s3lora_serve", "evaluate", server.url(""),
                    "--adapter", str(folder), "--tau", COUNTS, "--plan", str(plan),
                    "--task", f"{place / 'harmful.jsonl'}@refusal",
                    "--task", f"{place / 'calls.jsonl'}@exact_match",
                    "-o", str(place / "sweep.json"),
                ]  # fmt: skip
                done = subprocess.run(
                    command, env=base_environment(), capture_output=True, text=True, check=False
                )
            if done.returncode not in (0, 1):
                raise RuntimeError(done.stderr[-2000:])
            progress(f"{subject}: sweep", 1, 1)
            return json.loads((place / "sweep.json").read_text())

    return kept(RESULTS / f"sweep-{folder.name}.json", made)


def _write(file: Path, lines: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
