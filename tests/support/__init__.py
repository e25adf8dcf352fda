"""Helpers of tests, benchmarks and the demo: a tiny model, its adapters, a real server.

Without a GPU, Triton's kernels run in its interpreter. Triton decides this for each of its own
functions at its first import, so the variable is set here before other code imports Triton.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language  # noqa: F401
    except ImportError:
        pass  # tests of kernels skip and give the reason
    finally:
        del os.environ["TRITON_INTERPRET"]
