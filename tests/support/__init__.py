"""Shared by tests, benchmarks and the demo: a tiny model, real adapters for it, a real server.

Without a GPU, Triton's kernels run in its interpreter. Triton decides that for each of its own
functions when it is first imported, so this is done before anything else can import it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language  # noqa: F401
    except ImportError:
        pass  # tests of kernels say so and skip
    finally:
        del os.environ["TRITON_INTERPRET"]
