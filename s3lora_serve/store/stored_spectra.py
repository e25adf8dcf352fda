"""The spectra of a served adapter's modules, which stay in its stored copy.

They are most of a verdict's bytes, and are needed only where somebody looks at one adapter.
"""

import json
from dataclasses import replace
from pathlib import Path

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.store.stored_copy import VERDICT_NAME


def with_spectra(verdict: Verdict, path: Path) -> Verdict:
    """The verdict with the spectra in the stored copy at `path`; without, if it cannot be read."""
    try:
        stored = json.loads((path / VERDICT_NAME).read_bytes())["modules"]
        spectra = {module["name"]: tuple(module["spectrum"]) for module in stored}
    except (OSError, ValueError, KeyError, TypeError):
        return verdict
    modules = (replace(module, spectrum=spectra.get(module.name, ())) for module in verdict.modules)
    return replace(verdict, modules=tuple(modules))
