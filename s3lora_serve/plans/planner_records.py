"""What a planner notes of adapters without a plan, beside the folder of plans.

The planner writes the records and obeys them; servers only show them.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s3lora_serve.plans.folder import plan_name

MAX_RECORD_BYTES = 2**14
"""Ours: a record has six short fields."""

PlanProgress = Literal["made", "waiting", "failed", "none"]


@dataclass(frozen=True, slots=True)
class PlannerRecord:
    """What is known of one adapter without a plan."""

    first_seen: float  # seconds since 1970
    inputs: str = ""  # digest of base, probes and options that it failed with
    failures: int = 0
    code: str = ""  # of the last failure; "": none
    message: str = ""
    retry_at: float | None = None  # None, after a failure: given up

    @property
    def has_failed(self) -> bool:
        """Whether it is given up, until base, probes or options are others."""
        return self.code != "" and self.retry_at is None

    def is_due(self, now: float) -> bool:
        """Whether a calibration may begin."""
        return self.code == "" or (self.retry_at is not None and self.retry_at <= now)


def records_folder(plans: Path) -> Path:
    """Where planners of a folder of plans keep their records, if they are not told otherwise."""
    return plans.with_name(f"{plans.name}.planner")


def read_record(folder: Path, digest: str) -> PlannerRecord | None:
    """The record of the adapter with this digest; None: there is none, or none that is whole."""
    try:
        # A link or a device is no record of a planner's, and must not be waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(folder / record_name(digest), flags)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(MAX_RECORD_BYTES)
        return PlannerRecord(**json.loads(text))
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # cut off while it was written, or another version's


def record_name(digest: str) -> str:
    """The name of an adapter's record."""
    return f"{digest.removeprefix('sha256:')}.json"


def plan_progress(plans: Path, digest: str) -> tuple[PlanProgress, str]:
    """How far the plan for an adapter is, and the code of the failure if there was one."""
    if (plans / plan_name(digest)).exists():
        return "made", ""
    record = read_record(records_folder(plans), digest)
    if record is None:
        return "none", ""
    code = record.code if re.fullmatch(r"S3LORA-\d{3}", str(record.code)) else ""
    return ("failed" if record.has_failed else "waiting"), code
