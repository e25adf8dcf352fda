"""Runs the steps of `check.sh`, each within its time, and writes what each found at once."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = {  # seconds
    "machine": 30,
    "device_tests": 75,
    "scoring": 70,
    "repair": 40,
    "layers": 80,
    "doors": 90,
    "tokens": 170,
    "loads": 130,
}
"""What may take longest is last: a step that has no time left is left out."""

TOTAL_SECONDS = 530.0
GRACE_SECONDS = 15
"""For a step to stop its servers."""

ON_CPU = os.environ.get("CHECK_DEVICE") == "cpu"
SAID = 8000
"""Characters of what a failed step said that are kept. Servers' logs lie beside check.json."""

TIMES_ON_CPU = 3
"""The dry run has two cores, perhaps beside other work, and nobody pays for its minutes."""


def run_step(name: str, seconds: float) -> dict[str, Any]:
    """The last JSON object that a step printed, how it ended, and the end of what it said."""
    interpreted = {"TRITON_INTERPRET": "1"} if ON_CPU else {}
    command = [sys.executable, "-W", "ignore", "-m", f"tests.gpu.steps.{name}"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=output, stderr=said, text=True, start_new_session=True,
            env=os.environ | (interpreted if name in ("scoring", "layers") else {}),
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


def main() -> None:
    """Run all steps, or those named; the JSON so far is in OUT/check.json after each."""
    out = Path(os.environ["OUT"])
    started = time.monotonic()
    total = float(os.environ.get("CHECK_SECONDS", TOTAL_SECONDS))
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or STEPS:
        left = total - (time.monotonic() - started)
        most = STEPS[name] * (TIMES_ON_CPU if ON_CPU else 1)
        results[name] = (
            run_step(name, min(most, left)) if left > 2 * GRACE_SECONDS
            else {"status": None, "seconds": 0, "found": None, "said": "no time left"}
        )  # fmt: skip
        (out / "check.json").write_text(json.dumps(results, indent=1) + "\n")
        one = results[name]
        print(f"{name}: {one['status']} after {one['seconds']} s", flush=True)
        if one["status"] != 0:
            print(one["said"][-800:], flush=True)


if __name__ == "__main__":
    main()
