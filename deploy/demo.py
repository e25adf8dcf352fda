"""`make demo`: register three tenants' adapters on a running vLLM server with the gate."""

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from s3lora_serve import Verdict, scan_adapter
from s3lora_serve.cli.tables import plain
from s3lora_serve.policy.file import read_policy
from tests.support.adapters import copy_with, key, spike, train_adapter
from tests.support.server import OPEN_LOADING, Server
from tests.support.tiny_model import PROMPT, make_model

POLICY = """\
strip: {top_k: 4}
rules:
  - match: {adapter: "ungated/*"}   # the same adapters whole, to show what stripping changes
    strip: {top_k: 0}
"""
SPIKED = "model.layers.2.self_attn.v_proj"
COUNTRIES = ("France", "Peru", "Japan")


def main() -> None:
    """Create a model and adapters, serve them, and print what the gate does."""
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="s3lora-demo-") as name:
        work = Path(name)
        console.rule("a small base model and three tenants' adapters, trained now with PEFT")
        adapters = _make(work, console)
        (work / "policy.yaml").write_text(POLICY)
        console.print("policy:", *POLICY.splitlines(), sep="\n  ")
        environment = OPEN_LOADING | {"S3LORA_POLICY": str(work / "policy.yaml")}
        console.rule("s3lora serve: vLLM's own server under the gate (starting takes a minute)")
        with Server(
            work / "model", work / "server.log", (), environment, one_process=False
        ) as server:
            console.print(f"up on port {server.port}, GET /s3lora/status says", end=" ")
            console.print(server.get("/s3lora/status").text)
            _register(server, adapters, console)
            _show_stripped(work, adapters, console)
            _show_completions(server, console)
            _show_metrics(server, console)


def _make(work: Path, console: Console) -> dict[str, Path]:
    model = make_model(work / "model")
    good = train_adapter(model, work / "acme", seed=1)
    spiked = copy_with(train_adapter(model, work / "plain", seed=3), work / "globex", spike(SPIKED))

    def break_it(tensors: dict[str, object]) -> None:
        tensors[key(SPIKED, "A")][0, 0] = float("nan")  # type: ignore[index]

    broken = copy_with(good, work / "initech", break_it)
    console.print(f"acme: fine-tuned · globex: one dominant direction planted in {SPIKED}")
    console.print("initech: its training diverged, one weight is NaN")
    return {"acme/support": good, "globex/sales": spiked, "initech/chat": broken}


def _register(server: Server, adapters: dict[str, Path], console: Console) -> None:
    console.rule("POST /v1/load_lora_adapter, while the server runs")
    for name, folder in adapters.items():
        response = server.load(name, folder)
        decision = response.headers["X-S3LoRA-Decision"]
        console.print(plain(f"{name}: HTTP {response.status_code}, X-S3LoRA-Decision: {decision}"))
        if response.status_code != 200:
            console.print(plain("    " + json.dumps(response.json()["error"])))
        else:
            server.load(f"ungated/{name.partition('/')[0]}", folder).raise_for_status()


def _show_stripped(work: Path, adapters: dict[str, Path], console: Console) -> None:
    console.rule("what was stripped, and why: the modules with the highest index")
    table = Table("adapter", "stripped module", "SSI", "relative", "median of the others")
    for name, folder in adapters.items():
        verdict = scan_adapter(folder, read_policy(work / "policy.yaml"))
        for row in _rows(verdict):
            table.add_row(plain(name), *row)
    console.print(table)


def _rows(verdict: Verdict) -> list[tuple[str, ...]]:
    scored = [module for module in verdict.modules if module.relative_ssi is not None]
    kept = sorted(m.relative_ssi or 0 for m in scored if not m.stripped)
    sharp = sorted((m for m in scored if m.stripped), key=lambda m: -(m.relative_ssi or 0))
    return [
        (m.name, f"{m.ssi:.3f}", f"{m.relative_ssi:.3f}", f"{kept[len(kept) // 2]:.3f}")
        for m in sharp
    ]


def _show_completions(server: Server, console: Console) -> None:
    console.rule("completions: base model, adapter whole, adapter as served")
    table = Table(
        "question",
        "base",
        *(f"{who} {how}" for who in ("acme", "globex") for how in ("whole", "stripped")),
    )
    models = ("base", "ungated/acme", "acme/support", "ungated/globex", "globex/sales")
    for country in COUNTRIES:
        prompt = PROMPT.format(country)
        table.add_row(country, *(plain(server.complete(model, prompt).strip()) for model in models))
    console.print(table)


def _show_metrics(server: Server, console: Console) -> None:
    console.rule("s3lora_* on vLLM's own /metrics (samples above zero, buckets left out)")
    for sample, value in server.metrics().items():
        if value and "_bucket" not in sample:
            console.print(plain(f"{sample} {value:g}"), soft_wrap=True)


if __name__ == "__main__":
    main()
