"""One calibration for a planner, in a process of its own: its inputs, and what becomes of it."""

import json
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.errors import (
    AdapterRejected,
    BaseModelUnfit,
    BaseUnaligned,
    ChangedWhileCopying,
    GateFailed,
    NotAnAdapter,
    Reason,
    S3LoRAError,
    TargetMissed,
)
from s3lora_serve.lab.base_model.probes import ProbeFile
from s3lora_serve.lab.calibration.calibrate import Calibration, calibrate
from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
from s3lora_serve.lab.calibration.saved_search import SearchFile
from s3lora_serve.policy.limits import Limits

WATCH_SECONDS = 1.0
"""Interval between looks of a worker whether its planner still lives."""


@dataclass(frozen=True, slots=True)
class CalibrationInputs:
    """What all calibrations of a planner have in common."""

    base: Path
    files: tuple[ProbeFile, ...]
    options: CalibrationOptions
    device: str = "cpu"
    dtype: str = "bfloat16"
    accept_best: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationTask:
    """One adapter: where it lies, which weights are meant, and where the search is saved."""

    digest: str
    folder: str
    search: str


@dataclass(frozen=True, slots=True)
class CalibrationEnd:
    """A plan as JSON text, or the reason why there is none."""

    seconds: float
    plan: str | None = None
    told: str = ""  # what the plan changes, in a few words
    reason: Reason | None = None
    may_pass: bool = False  # whether another try may end otherwise
    is_planners: bool = False  # base model or probes are at fault, and no adapter


class Calibrators(Protocol):
    """Workers that hold the base model; each calibrates one adapter at a time."""

    def free(self) -> int:
        """How many tasks may be submitted now."""

    def submit(self, task: CalibrationTask) -> "Future[CalibrationEnd]":
        """Begin a calibration."""

    def close(self) -> None:
        """End all workers, and what they are doing."""


def calibration_end(
    base: CalibrationBase, inputs: CalibrationInputs, task: CalibrationTask
) -> CalibrationEnd:
    """The end of one calibration. It never raises what an adapter or a base model can cause."""
    started = time.monotonic()

    def ended(error: S3LoRAError, *, may_pass: bool) -> CalibrationEnd:
        taken = time.monotonic() - started
        return CalibrationEnd(taken, reason=Reason.of(error), may_pass=may_pass)

    try:
        # Before minutes are spent: tenants change folders, also while a plan for them is made.
        if (held := copy_adapter(Path(task.folder), Limits()).digest) != task.digest:
            raise ChangedWhileCopying(f"{task.folder} holds {held} now, not {task.digest}")
        found = calibrate(
            base,
            Path(task.folder),
            inputs.files,
            inputs.options,
            saved=SearchFile(Path(task.search), resume=True),
        )
    except (ChangedWhileCopying, NotAnAdapter, GateFailed) as error:  # its storage may come back
        return ended(error, may_pass=True)
    except (BaseUnaligned, BaseModelUnfit) as error:
        return replace(ended(error, may_pass=True), is_planners=True)
    except AdapterRejected as error:
        return ended(error, may_pass=False)
    except (MemoryError, RuntimeError, OSError) as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return ended(GateFailed(said), may_pass=True)
    if found.plan.adapter_digest != task.digest:
        changed = ChangedWhileCopying(f"{task.folder} holds {found.plan.adapter_digest} now")
        return ended(changed, may_pass=True)
    if not (found.reached or inputs.accept_best):
        best = min(point.measured.asr.value for point in found.frontier)
        missed = f"the best on the calibration split is {best:.2f}, not {inputs.options.max_asr:g}"
        return ended(TargetMissed(missed), may_pass=False)
    taken = time.monotonic() - started
    return CalibrationEnd(taken, json.dumps(found.plan.as_json(), indent=1), _told(found))


def _told(found: Calibration) -> str:
    before, after = found.plan.before, found.plan.after
    if before is None or after is None:
        return ""
    return (
        f"ASR {before.asr.value:.2f} -> {after.asr.value:.2f},"
        f" skill {before.skill.value:.2f} -> {after.skill.value:.2f}"
    )


_base: CalibrationBase | None = None
_inputs: CalibrationInputs | None = None


def _begin(inputs: CalibrationInputs, planner: int) -> None:
    """Prepare a worker process; the base model is loaded by its first task."""
    global _base, _inputs
    _base, _inputs = CalibrationBase(inputs.base, inputs.device, inputs.dtype), inputs

    def watch() -> None:
        while os.getppid() == planner:
            time.sleep(WATCH_SECONDS)
        os._exit(1)  # nobody wants the result; a killed planner must not leave a worker behind

    threading.Thread(target=watch, daemon=True).start()


def _run(task: CalibrationTask) -> CalibrationEnd:
    assert _base is not None and _inputs is not None  # noqa: S101, PT018 - `_begin`
    return calibration_end(_base, _inputs, task)


class LocalCalibrator:
    """One worker process on this machine: what an adapter does to it ends no planner."""

    def __init__(self, inputs: CalibrationInputs) -> None:
        self._inputs = inputs
        self._pool: ProcessPoolExecutor | None = None
        self._running: Future[CalibrationEnd] | None = None

    def free(self) -> int:
        """1 while no calibration is under way."""
        return 0 if self._running is not None and not self._running.done() else 1

    def submit(self, task: CalibrationTask) -> "Future[CalibrationEnd]":
        """Begin a calibration, in a new process if the former one died."""
        try:
            running = self._started().submit(_run, task)
        except BrokenProcessPool:
            self.close()
            running = self._started().submit(_run, task)
        self._running = running
        return running

    def close(self) -> None:
        """End the worker at once."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=_begin, initargs=(self._inputs, os.getpid())
            )
        return self._pool
