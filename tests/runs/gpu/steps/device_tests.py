"""Step 2: the tests of scoring on a device, on the device."""

import os
import sys
from collections import Counter
from typing import Any

import pytest

from tests.runs.gpu.steps import ON_GPU, show

TESTS = ("tests/spectral/test_device.py", "tests/spectral/test_fallback.py")
ON_A_CPU = ("-k", "gives_what_the_host and torch.float32 or full_device")


class Outcomes:
    """Counts outcomes, and keeps what failed with its last line."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]
        show({"counts": dict(self.counts), "failed": self.failed})


def main() -> None:
    """Run them in this process."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
    more = () if ON_GPU else ON_A_CPU
    options = ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    sys.exit(pytest.main([*options, *TESTS, *more], plugins=[Outcomes()]))


if __name__ == "__main__":
    main()
