"""A real vLLM server (CPU) on a free port, guarded or stock, and the requests that tests send."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter

START_SECONDS = 240
ENGINE = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--enable-lora",
    "--max-lora-rank", "16", "--max-loras", "2", "--max-cpu-loras", "8", "--max-num-seqs", "8",
)  # fmt: skip
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor for one GPU: the worker is in the engine's process. Its CPU build has a process
for the worker by default, and a start takes half as long again, most of it imports."""

ONE_CORE = {"OMP_NUM_THREADS": "1"}
"""For an engine with ONE_PROCESS; vLLM sets it for workers in processes of their own."""

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
"""For two workers: one core each."""

OPEN_LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def base_environment() -> dict[str, str]:
    """The environment of this process without variables that configure vLLM or the gate."""
    foreign = ("VLLM_", "S3LORA_", "PROMETHEUS_")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | CPU


def _default_hangup() -> None:
    """Restore the default for SIGHUP: tests may run under nohup, whose children ignore it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class _SentFrom(HTTPAdapter):
    """Sends requests from one of this machine's addresses."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self._address, 0), **options)


@dataclass
class Server:
    """One server process. Use as a context manager, which ends the process."""

    model: Path
    log: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    guarded: bool = True
    program: tuple[str, ...] = ("-m", "s3lora_serve", "serve")  # starts a guarded server
    python: str = sys.executable
    key: str | None = None  # the API key, if the server has one
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with every request
    client: str | None = None  # the address that requests are sent from; None: the usual one
    one_process: bool = True  # with one worker: see ONE_PROCESS; False: vLLM's default
    folder: Path | None = None  # working directory; the tests' own puts this project on the path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait()
        except BaseException:  # a signal too: the server is in a session of its own
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        rest = (
            *ENGINE,
            "--served-model-name",
            "base",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *self.arguments,
        )
        own = base_environment() | self.environment
        if self.one_process and not any("parallel-size" in each for each in self.arguments):
            rest += ("--distributed-executor-backend", ONE_PROCESS)
            own = ONE_CORE | own
        if self.guarded:
            command = [self.python, *self.program, str(self.model), *rest]
        else:
            command = [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(self.model),
                *rest,
            ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=own,
                start_new_session=True, cwd=self.folder, preexec_fn=_default_hangup,
            )  # fmt: skip

    def wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if requests.get(self.url("/health"), timeout=2).status_code == 200:
                    return
            except requests.ConnectionError:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(f"server not up after {START_SECONDS} s:\n{self.tail()}")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):  # the engine's processes are in the same session
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        bearer = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        options = {"headers": bearer | dict(self.headers)} | options
        with requests.Session() as session:
            if self.client:
                session.mount("http://", _SentFrom(self.client))
            return session.request(method, self.url(path), timeout=120, **options)

    def get(self, path: str) -> requests.Response:
        return self.request("GET", path)

    def post(self, path: str, **body: Any) -> requests.Response:
        return self.request("POST", path, json=body)

    def load(self, name: str, folder: Path, **more: Any) -> requests.Response:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)

    def unload(self, name: str) -> requests.Response:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def complete(self, model: str, prompt: str, tokens: int = 12) -> str:
        answer = self.post(
            "/v1/completions", model=model, prompt=prompt, max_tokens=tokens, temperature=0
        )
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def logprobs(self, model: str, prompt: str) -> list[dict[str, float]]:
        """The log-probabilities of the five likeliest tokens at each position of the prompt."""
        answer = self.post(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=1,
            temperature=0,
            prompt_logprobs=5,
        )
        answer.raise_for_status()
        positions = answer.json()["choices"][0]["prompt_logprobs"]
        return [{t: v["logprob"] for t, v in one.items()} for one in positions if one]

    def metrics(self) -> dict[str, float]:
        """Every `s3lora_` sample of /metrics, keyed by its name with labels."""
        lines = self.get("/metrics").text.splitlines()
        samples = (line.rpartition(" ") for line in lines if line.startswith("s3lora_"))
        return {name: float(value) for name, _, value in samples}
