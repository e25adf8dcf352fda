"""`make load-fleet`: an hour of a large fleet on a real vLLM server.

Two thousand distinct adapters of random sizes, a fifth of them hostile, are registered, replaced,
edited and unloaded while users query the base model. Meanwhile the policy changes every minute,
and at half time a worker is killed and the server started again on the same store. Then stock vLLM
serves the good ones: its memory grows too, and the gate's growth is what lies beyond that.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import requests
import torch
import yaml

from s3lora_serve.policy.schema import Policy, parse_policy
from tests.runs.load.__main__ import ROOM, reference_answers
from tests.runs.load.fleet_members import make_fleet
from tests.runs.load.fleet_report import GuardedSegment, Segment, write_report
from tests.runs.load.tenants import TRAINED, Tenant, make_tenants
from tests.runs.load.traffic import Answer, Traffic
from tests.runs.load.watch import Watch, processes
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import make_model

MINUTES = float(os.environ.get("MINUTES", "60"))
ADAPTERS = int(os.environ.get("ADAPTERS", "2000"))
BETWEEN_CHANGES = 60.0
"""Seconds between changes of the policy."""

HALVES = ("first half", "second half")
MAX_STORE = 9_000_000
NOTICE_SECONDS = 60
"""Time in which a server whose worker is killed has to fail its probe; vLLM does not end it."""


def main() -> int:
    """Run, write RESULTS.md; exit code 1 if anything went wrong."""
    torch.set_num_threads(1)  # the server needs the cores
    with tempfile.TemporaryDirectory(prefix="s3lora-fleet-") as folder:
        root = Path(folder)
        model = make_model(root / "model")
        tenants = make_tenants(model, root, policy_of(0))
        references = reference_answers(model, tenants, root / "stock.log")
        fleet = make_fleet([root / f"trained-{i}" for i in range(TRAINED)], tenants, ADAPTERS)
        segments = run_fleet(model, fleet, references, root, MINUTES * 60)
        stock = run_stock(model, fleet, root, MINUTES * 60 / 4, segments[-1])
        problems = write_report(segments, stock, len(fleet))
    return int(bool(problems))


def run_fleet(
    model: Path,
    fleet: list[Tenant],
    references: dict[str, list[Answer]],
    root: Path,
    seconds: float,
) -> list[GuardedSegment]:
    """Two halves on one store, with a killed worker between them."""
    policy = root / "policy.yaml"
    policy.write_text(yaml.safe_dump(policy_data(0)))
    environment = OPEN_LOADING | {
        "S3LORA_POLICY": str(policy),
        "S3LORA_STATE_DIR": str(root / "state"),
        "S3LORA_AUDIT_LOG": str(root / "audit.jsonl"),
    }
    segments = []
    for name in HALVES:
        with Server(model, root / f"{name}.log", ROOM, environment, one_process=False) as server:
            traffic = Traffic(server, fleet, references, root, sys.maxsize)
            segment = GuardedSegment(name, traffic, state=root / "state", max_store=MAX_STORE)
            run(segment, server, policy, seconds / 2)
            if name == HALVES[0]:
                segment.noticed_after = kill_worker(server, traffic)
            segments.append(segment)
        segment.thread.join()  # requests that a dead engine holds end with the server
    return segments


def run(segment: GuardedSegment, server: Server, policy: Path, seconds: float) -> None:
    """Traffic for some seconds, with samples of memory, store and metrics, and new policies.

    The traffic of the first half goes on while its worker is killed.
    """
    assert server.process is not None
    traffic = segment.traffic
    end = time.monotonic() + seconds
    last = segment.name == HALVES[1]
    traffic.until = end if last else float("inf")
    segment.thread = threading.Thread(target=traffic.run, daemon=True)  # ends if this one fails
    segment.thread.start()
    with Watch(server.process.pid) as segment.watch:
        number = 0
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(BETWEEN_CHANGES, seconds / 6, left))
            number += 1
            write_policy(policy, number)
            segment.sample(server)
    if last:
        segment.thread.join()
        check_alive(server, traffic)


def check_alive(server: Server, traffic: Traffic) -> None:
    """Note it if the engine is dead."""
    if server.get("/health").status_code != 200:
        traffic.problems.append("the engine is dead")


def run_stock(
    model: Path,
    fleet: list[Tenant],
    root: Path,
    seconds: float,
    like: Segment,
) -> Segment:
    """Stock vLLM with the good adapters, and as many base requests for each as in another part.

    Its answers are not compared: it strips nothing, and its CPU operations let an adapter act on
    base-model requests in the same batch.
    """
    good = [tenant for tenant in fleet if tenant.code is None]
    environment = OPEN_LOADING | {"VLLM_PLUGINS": ""}
    with Server(
        model, root / "stock.log", ROOM, environment, guarded=False, one_process=False
    ) as server:
        assert server.process is not None
        traffic = Traffic(server, good, {}, root, sys.maxsize, tampers=False)
        traffic.base_share = like.traffic.done["base requests"] / like.traffic.done["served"]
        traffic.until = time.monotonic() + seconds
        segment = Segment("stock vLLM", traffic)
        with Watch(server.process.pid) as segment.watch:
            traffic.run()
        check_alive(server, traffic)
    return segment


def policy_data(number: int) -> dict[str, Any]:
    """A policy; the rules for adapters whose answers are compared are the same in all."""
    return {
        "strip": {"top_k": 3},
        "store": {"max_bytes": MAX_STORE - 1000 * (number % 3)},
        "deny": [f"sha256:{number:064x}"],
        "rules": [{"match": {"adapter": "fleet-*"}, "strip": {"top_k": number % 6}}],
    }


def policy_of(number: int) -> Policy:
    """The same, as a policy."""
    return parse_policy(policy_data(number), "fleet")


def write_policy(file: Path, number: int) -> None:
    """Replace the policy by another; every fifth is invalid and changes nothing."""
    invalid = {"no key": "of a policy"} if number % 5 == 4 else {}
    part = file.with_suffix(".part")
    part.write_text(yaml.safe_dump(policy_data(number) | invalid, explicit_end=True))
    part.replace(file)


def kill_worker(server: Server, traffic: Traffic) -> float:
    """Send SIGKILL to the worker under traffic; seconds until `/health` fails."""
    assert server.process is not None
    [worker] = [
        process
        for process in processes(server.process.pid)
        if (process / "cmdline").read_text(errors="replace").startswith("VLLM::Worker")
    ]
    traffic.cut_off()
    started = time.monotonic()
    os.kill(int(worker.name), signal.SIGKILL)
    while _is_healthy(server):
        assert time.monotonic() - started < NOTICE_SECONDS, "the killed worker is not noticed"
        time.sleep(0.2)
    return time.monotonic() - started


def _is_healthy(server: Server) -> bool:
    try:
        return server.get("/health").status_code == 200
    except requests.RequestException:
        return False


if __name__ == "__main__":
    sys.exit(main())
