"""`s3lora planner`: makes plans for all adapters of running servers, in the background."""

import hashlib
import signal
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from s3lora_serve.cli.calibrate import (
    AcceptBestOption,
    BenignOption,
    DtypeOption,
    HarmfulOption,
    MaxASROption,
    SkillOption,
    StepsOption,
    read_probe_files,
)
from s3lora_serve.cli.options import (
    REJECTED,
    Device,
    Dtype,
    ModelDeviceOption,
    check_device,
    check_url,
    refusals_stop,
    stop,
    torch_device,
)
from s3lora_serve.plans.defaults import MAX_ASR, STEPS

if TYPE_CHECKING:
    from s3lora_serve.lab.planner.calibrator import CalibrationInputs, Calibrators
    from s3lora_serve.lab.planner.planner import Planner

POLL_SECONDS = 1.0
"""Interval between looks whether a calibration has ended, with --once."""


URLsArgument = Annotated[list[str], typer.Argument(help="Guarded servers: http://HOST:PORT.")]
BaseOption = Annotated[Path, typer.Option(help="The base model's folder.")]
PlansOption = Annotated[
    Path, typer.Option(help="The folder of plans that the servers' policy names.")
]
StateOption = Annotated[
    Path | None, typer.Option(help="Records and locks, on the same storage; else PLANS.planner.")
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", help="The servers' key.", envvar="VLLM_API_KEY")
]
OnceOption = Annotated[bool, typer.Option("--once", help="End when no adapter waits; for cron.")]
IntervalOption = Annotated[float, typer.Option(min=1, help="Seconds between looks at the servers.")]
RayOption = Annotated[
    str | None, typer.Option(help="Calibrate on a Ray cluster: auto, or its address.")
]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics there.")
]


def planner(
    urls: URLsArgument,
    base: BaseOption,
    harmful: HarmfulOption,
    benign: BenignOption,
    plans: PlansOption,
    skill: SkillOption = None,
    state: StateOption = None,
    key: KeyOption = None,
    once: OnceOption = False,
    interval: IntervalOption = 30.0,
    ray: RayOption = None,
    metrics_port: PortOption = None,
    max_asr: MaxASROption = MAX_ASR,
    steps: StepsOption = STEPS,
    accept_best: AcceptBestOption = False,
    device: ModelDeviceOption = Device.AUTO,
    dtype: DtypeOption = Dtype.BFLOAT16,
) -> None:
    """Make a plan for each adapter that is served without one, and have the servers take it.

    Exit code: 0, 1 with --once if an adapter is given up or a server does not answer, 2 wrong
    usage.
    """
    check_device(device)
    if find_spec("transformers") is None:
        stop("planner needs transformers: install s3lora-serve with its extra [calibrate]")
    for url in urls:
        check_url(url)
    with refusals_stop():
        from s3lora_serve.lab.calibration.calibration_options import CalibrationOptions
        from s3lora_serve.lab.planner.calibrator import CalibrationInputs

        base.stat()
        inputs = CalibrationInputs(
            base.absolute(),
            tuple(read_probe_files(harmful, benign, skill)),
            CalibrationOptions(max_asr=max_asr, steps=steps),
            torch_device(device),
            dtype.value,
            accept_best,
        )
        found = _planner(urls, key, plans, state, inputs, ray, metrics_port)
    failed = _run(found, interval, once=once)
    raise typer.Exit(REJECTED if failed else 0)


def _planner(
    urls: list[str],
    key: str | None,
    plans: Path,
    state: Path | None,
    inputs: "CalibrationInputs",
    ray: str | None,
    metrics_port: int | None,
) -> "Planner":
    from prometheus_client import start_http_server

    from s3lora_serve.lab.planner.fleet import FleetServer
    from s3lora_serve.lab.planner.plan_state import PlanState
    from s3lora_serve.lab.planner.planner import Planner
    from s3lora_serve.lab.planner.planner_metrics import PlannerMetrics
    from s3lora_serve.plans.planner_records import records_folder

    plans.stat()
    folder = state or records_folder(plans.absolute())
    metrics = PlannerMetrics()
    if metrics_port is not None:
        start_http_server(metrics_port)
    return Planner(
        [FleetServer(url, key) for url in urls],
        PlanState(plans.absolute(), folder.absolute(), _digest(inputs)),
        _calibrators(inputs, ray),
        metrics,
        lambda line: typer.echo(f"{time.strftime('%H:%M:%S')} {line}"),
    )


def _calibrators(inputs: "CalibrationInputs", ray: str | None) -> "Calibrators":
    if ray is None:
        from s3lora_serve.lab.planner.calibrator import LocalCalibrator

        return LocalCalibrator(inputs)
    try:
        from s3lora_serve.lab.planner.ray_calibrators import RayCalibrators
    except ImportError:
        stop("--ray needs Ray: install s3lora-serve with its extra [ray]")
    try:
        return RayCalibrators(inputs, ray)
    except ConnectionError as error:
        stop(f"--ray {ray}: {error}")


def _digest(inputs: "CalibrationInputs") -> str:
    """What failures are remembered for: with other inputs a calibration may end otherwise."""
    files = [file.digest for file in inputs.files]
    text = repr((str(inputs.base), files, inputs.options, inputs.dtype, inputs.accept_best))
    return hashlib.sha256(text.encode()).hexdigest()


def _run(planner: "Planner", interval: float, *, once: bool) -> bool:
    """Make rounds until nothing waits (`once`) or a signal comes; whether one failed."""
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    with suppress(ValueError):  # not the main thread: a test's
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
    try:
        while not ended.is_set():
            try:
                left = planner.round()
            except OSError as error:  # storage that is away comes back
                typer.echo(f"s3lora: {error.filename}: {error.strerror}", err=True)
                left = 1
            if once and planner.obstacle is not None:
                return True
            if once and not (left or planner.is_working):
                return planner.has_failed
            ended.wait(POLL_SECONDS if planner.is_working else interval)
    finally:
        planner.close()
    return False
