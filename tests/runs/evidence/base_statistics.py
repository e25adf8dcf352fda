"""The statistics of a base, which repair needs."""

from pathlib import Path
from typing import get_args

from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.statistics.input_statistics import Choice
from s3lora_serve.lab.statistics.make_statistics import Benign, StatisticsProbes, make_statistics
from tests.runs.evidence.base_model import Progress
from tests.runs.evidence.probes import probe_files, request_file
from tests.runs.evidence.skill import SkillName
from tests.runs.evidence.training import DTYPE
from tests.runs.evidence.wheels import CACHE


def statistics(base: Path, without: SkillName | None, progress: Progress) -> Path:
    """The statistics of a base, from the operator's probes and requests of the skills.

    `without` names a skill of which there are none.
    """
    names = [name for name in get_args(SkillName) if name != without]
    stem = "-".join([base.name, *(name.replace(" ", "-") for name in names)])
    target = (CACHE / "statistics" / f"{stem}.safetensors").absolute()
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        files = probe_files("tool calls")
        benign = [files["benign"], *(request_file(name) for name in names)]
        make_statistics(
            base,
            StatisticsProbes(
                read_probes(files["harmful"], "harmful"),
                [Benign(read_probes(file, "benign")) for file in benign],
            ),
            target,
            Choice(),
            dtype=DTYPE,
            resume=True,
            progress=lambda phase, done, total: progress(f"{base.name}: {phase}", done, total),
        )
    return target
