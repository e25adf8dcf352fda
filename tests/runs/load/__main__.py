"""`make load`: hundreds of hot loads and unloads on a real vLLM server, every answer checked.

Fifty tenants with good, bad and hostile adapters register, replace, edit and unload them while
users query the base model. Then the engine is killed and restarted on the same store. At last
bursts of 200 loads come at once, half of whose clients may leave.
"""

import os
import signal
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from s3lora_serve.policy.file import read_policy
from tests.runs.load.bursts import run_bursts
from tests.runs.load.report import Run, write_report
from tests.runs.load.tenants import Tenant, make_tenants
from tests.runs.load.traffic import QUESTIONS, Answer, Traffic, ask, distance
from tests.runs.load.watch import Watch, processes
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import make_model

LOADS = int(os.environ.get("LOADS", "500"))
ROOM = ("--max-cpu-loras", "4", "--max-loras", "2", "--disable-uvicorn-access-log")
"""Few slots, so that adapters are evicted all the time."""


def main() -> int:
    torch.set_num_threads(1)  # the servers need the cores
    with tempfile.TemporaryDirectory(prefix="s3lora-load-") as folder:
        root = Path(folder)
        policy = root / "policy.yaml"
        policy.write_text("strip: {top_k: 3}\nstore: {max_bytes: 9000000}\n")
        model = make_model(root / "model")
        tenants = make_tenants(model, root, read_policy(policy))
        references = reference_answers(model, tenants, root / "stock.log")
        environment = OPEN_LOADING | {
            "S3LORA_POLICY": str(policy),
            "S3LORA_STATE_DIR": str(root / "state"),
            "S3LORA_AUDIT_LOG": str(root / "audit.jsonl"),
        }
        runs = []
        with Server(model, root / "first.log", ROOM, environment, one_process=False) as server:
            runs.append(one_run("first", server, tenants, references, root, LOADS))
            kill_engine(server)
        with Server(model, root / "second.log", ROOM, environment, one_process=False) as server:
            runs.append(one_run("after a kill", server, tenants, references, root, LOADS // 4))
        write_report(runs)
        wrong = run_bursts(model, root)
    return int(bool(wrong) or any(run.problems for run in runs))


def reference_answers(model: Path, tenants: list[Tenant], log: Path) -> dict[str, list[Answer]]:
    """Stock vLLM's answers with each adapter written without its stripped modules."""
    good = [tenant for tenant in tenants if tenant.stripped]
    environment = OPEN_LOADING | {"VLLM_PLUGINS": ""}
    with Server(model, log, (), environment, guarded=False, one_process=False) as stock:
        found = {"base": [ask(stock, "base", question) for question in QUESTIONS]}
        for tenant in good:
            assert stock.load(tenant.name, tenant.stripped).status_code == 200
            found[tenant.name] = [ask(stock, tenant.name, question) for question in QUESTIONS]
            stock.unload(tenant.name)
    nearest = min(max(map(distance, found[a.name], found[b.name])) for a, b in pairwise(good))
    assert nearest > 0.01, "adapters that answer alike could be mistaken for each other unnoticed"
    return found


def one_run(
    name: str,
    server: Server,
    tenants: list[Tenant],
    references: dict[str, list[Answer]],
    root: Path,
    loads: int,
) -> Run:
    """Load and unload under traffic while memory, files and threads are sampled."""
    assert server.process is not None
    traffic = Traffic(server, tenants, references, root, loads)
    started = time.monotonic()
    with Watch(server.process.pid) as watch:
        traffic.run()
    seconds = time.monotonic() - started
    if server.get("/health").status_code != 200:
        traffic.problems.append("the engine is dead")
    return Run(name, traffic, watch, seconds, server.metrics())


def kill_engine(server: Server) -> None:
    """Send SIGKILL, as the kernel does when memory runs out: no cleanup runs."""
    assert server.process is not None
    for process in processes(server.process.pid):
        if "EngineCore" in (process / "cmdline").read_text(errors="replace"):
            os.kill(int(process.name), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
