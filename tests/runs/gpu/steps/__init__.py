"""The steps of `check.sh`. Each prints a JSON object of what it has found so far, line by line."""

import json
import os
from pathlib import Path
from typing import Any

DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
"""`cuda`, or `cpu` to try the steps themselves: sizes are small then, and times mean nothing."""

ON_GPU = DEVICE == "cuda"


ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} if ON_GPU else {}
"""Of engines: FlashInfer is not in the pack."""

OUT = Path(os.environ.get("OUT", "."))
"""Where check.json and the logs of servers are written."""


def show(found: dict[str, Any]) -> None:
    """Print what was found so far; the last line counts, also of a step that is stopped."""
    print(json.dumps(found), flush=True)
