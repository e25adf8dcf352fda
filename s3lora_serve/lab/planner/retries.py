"""When a calibration that failed is tried again, and when it is given up."""

import time
from dataclasses import replace

from s3lora_serve.errors import Reason
from s3lora_serve.plans.planner_records import PlannerRecord

TRIES = 3
"""Calibrations of one adapter that fail with an error which may pass, before it is given up."""

RETRY_SECONDS = 60.0
"""From a failure that may pass to the next try. It doubles with each."""


def after_failure(
    before: PlannerRecord, reason: Reason, inputs: str, *, may_pass: bool
) -> PlannerRecord:
    """What is known of an adapter after one more calibration of it has failed."""
    count = before.failures + 1
    again = may_pass and count < TRIES
    wait = RETRY_SECONDS * 2 ** (count - 1)
    return replace(
        before,
        inputs=inputs,
        failures=count,
        code=reason.code,
        message=reason.message[:500],
        retry_at=time.time() + wait if again else None,
    )
