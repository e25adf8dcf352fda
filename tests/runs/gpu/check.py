"""Runs the steps of `check.sh`, each within its time, and writes what each found at once."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = {  # seconds
    "machine": 30,
    "device_tests": 75,
    "scoring": 75,
    "repair": 40,
    "layers": 95,
    "doors": 110,
    "tokens": 215,
    "loads": 215,
}
"""What may take longest is last: a step that has no time left is left out."""

SIDE_BY_SIDE = ("doors", "tokens", "loads")
"""An engine takes over half a minute to start: these start theirs together, and measure in turns,
after the doors."""

TOTAL_SECONDS = 530.0
GRACE_SECONDS = 15
"""For a step to stop its servers."""

ON_CPU = os.environ.get("CHECK_DEVICE") == "cpu"
SAID = 8000
"""Characters of what a failed step said that are kept. Servers' logs lie beside check.json."""

TIMES_ON_CPU = 3
"""The dry run has two cores, perhaps beside other work, and nobody pays for its minutes."""


def run_step(name: str, seconds: float, **environment: str) -> dict[str, Any]:
    """The last JSON object that a step printed, how it ended, and the end of what it said."""
    interpreted = {"TRITON_INTERPRET": "1"} if ON_CPU else {}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.runs.gpu.steps.{name}"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=output, stderr=said, text=True, start_new_session=True,
            env=os.environ
            | (interpreted if name in ("scoring", "layers") else {})
            | environment,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        _end(process)
        lines, text = _text(output).splitlines(), _text(said)
    found = [line for line in lines if line.startswith("{")]
    return {
        "status": code, "seconds": round(time.monotonic() - started, 1),
        "found": json.loads(found[-1]) if found else None,
        "said": text[-SAID:] if code != 0 else "",
    }  # fmt: skip


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def _end(process: subprocess.Popen[str]) -> None:
    """End the step and whatever it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number == signal.SIGINT and process.poll() is None:
            time.sleep(GRACE_SECONDS)
    process.wait()


class Check:
    """The steps' results, in OUT/check.json after each."""

    def __init__(self, out: Path, seconds: float) -> None:
        self._file, self._deadline = out / "check.json", time.monotonic() + seconds
        self._results: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, name: str, **environment: str) -> None:
        """One step, within its time and what is left."""
        left = self._deadline - time.monotonic()
        most = STEPS[name] * (TIMES_ON_CPU if ON_CPU else 1)
        self._note(name, (
            run_step(name, min(most, left), **environment) if left > 2 * GRACE_SECONDS
            else {"status": None, "seconds": 0, "found": None, "said": "no time left"}
        ))  # fmt: skip

    def run_side_by_side(self, names: Sequence[str]) -> None:
        """Some steps at once."""
        with tempfile.TemporaryDirectory() as turns:
            more = {"CHECK_TURNS": turns, "CHECK_BESIDE": " ".join(names)}

            def run(name: str) -> None:
                self.run(name, **more)
                (Path(turns) / f"{name}.up").touch()  # nobody waits for it any more

            threads = [threading.Thread(target=run, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _note(self, name: str, one: dict[str, Any]) -> None:
        with self._lock:
            self._results[name] = one
            self._file.write_text(json.dumps(self._results, indent=1) + "\n")
            print(f"{name}: {one['status']} after {one['seconds']} s", flush=True)
            if one["status"] != 0:
                print(one["said"][-800:], flush=True)


def main() -> None:
    """Run all steps, or those named."""
    names = sys.argv[1:] or list(STEPS)
    check = Check(Path(os.environ["OUT"]), float(os.environ.get("CHECK_SECONDS", TOTAL_SECONDS)))
    together = [name for name in names if name in SIDE_BY_SIDE and not ON_CPU]
    for group in [*([name] for name in names if name not in together), together]:
        check.run_side_by_side(group)


if __name__ == "__main__":
    main()
