"""Calibrations on a Ray cluster: an actor for each GPU, or for each group of cores (extra: ray)."""

import logging
from concurrent.futures import Future
from typing import Any

import ray

from s3lora_serve.lab.calibration.calibration_base import CalibrationBase
from s3lora_serve.lab.planner.calibrator import (
    CalibrationEnd,
    CalibrationInputs,
    CalibrationTask,
    calibration_end,
)

CORES = 2
"""Cores of a worker without a GPU: a calibration's products gain little from more. Ours."""


class _Worker:
    """Holds the base model in a process of the cluster."""

    def __init__(self, inputs: CalibrationInputs) -> None:
        self._inputs = inputs
        self._base = CalibrationBase(inputs.base, inputs.device, inputs.dtype)

    def calibrate(self, task: CalibrationTask) -> CalibrationEnd:
        return calibration_end(self._base, self._inputs, task)


class RayCalibrators:
    """Workers on the machines of a cluster, which need the same folders under the same paths."""

    def __init__(self, inputs: CalibrationInputs, address: str) -> None:
        """Join a cluster; `address` is `auto` or its address.

        Raises:
            ConnectionError: no cluster was found.
        """
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        on_gpu = inputs.device == "cuda"
        unit = "GPU" if on_gpu else "CPU"
        count = max(1, int(resources.get(unit, 0)) // (1 if on_gpu else CORES))
        cores = min(CORES, int(resources.get("CPU", 1)))
        needs: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
        # A worker whose process or machine died is started again; its task fails and is retried.
        remote: Any = ray.remote
        made = remote(max_restarts=-1, **needs)(_Worker)
        self._actors = [made.remote(inputs) for _ in range(count)]
        self._running: list[Future[CalibrationEnd] | None] = [None] * count

    def free(self) -> int:
        """How many workers have nothing to do."""
        return len(self._free_places())

    def submit(self, task: CalibrationTask) -> "Future[CalibrationEnd]":
        """Begin a calibration on a free worker."""
        place = self._free_places()[0]
        found: Future[CalibrationEnd] = self._actors[place].calibrate.remote(task).future()
        self._running[place] = found
        return found

    def _free_places(self) -> list[int]:
        return [
            place
            for place, running in enumerate(self._running)
            if running is None or running.done()
        ]

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            ray.kill(actor)
        ray.shutdown()
