"""`vllm serve` under the gate with several API servers, for vLLM's CPU build.

The `vllm` command of that build does not start (it looks for a distribution named vllm). The module
that `s3lora serve` runs instead supports one API server only. This program runs the command's code.
"""

import os
import sys
import tempfile
from pathlib import Path

from s3lora_serve.launcher.vllm_command import EXTENSION, GUARDED_WORKER, environment


def main() -> None:
    """Serve the model `sys.argv[1]`; the arguments after it are vLLM's."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment(os.environ, lambda: Path(folder)))
        _serve()


def _serve() -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    arguments = parser.parse_args(["serve", *sys.argv[1:], EXTENSION, GUARDED_WORKER])
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    main()
