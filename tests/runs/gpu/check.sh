#!/usr/bin/env bash
# All that only a GPU can tell, in nine minutes: `OUT=folder tests/runs/gpu/check.sh [STEP…]`.
#
# Needs the folder that `make gpu-pack` makes, PyTorch with CUDA, and no package index. The result is
# OUT/check.json; `python -m tests.runs.gpu.report OUT` makes tests/runs/gpu/RESULTS.md of it.
# CHECK_DEVICE=cpu tries the steps themselves in an environment that has vLLM already.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OUT=${OUT:-.gpu/out} CHECK_DEVICE=${CHECK_DEVICE:-cuda} GPU_PACK=${GPU_PACK:-$PWD/.gpu}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
python=${PYTHON:-python3}
mkdir -p "$OUT"
if [ "$CHECK_DEVICE" = cuda ]; then
    site=/tmp/s3lora-gpu-check
    rm -rf "$site" && mkdir -p "$site"
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$GPU_PACK"/wheels/*.whl
    "$python" - "$GPU_PACK" "$site" <<'PYTHON'
import lzma, pathlib, sys, tarfile
pack, site = map(pathlib.Path, sys.argv[1:])
tarfile.open(pack / "vllm.tar.xz").extractall(site, filter="data")
library = lzma.decompress((pack / "library.so.xz").read_bytes())
(site / "vllm" / "_C_stable_libtorch.abi3.so").write_bytes(library)
PYTHON
    "$python" -m compileall -q -j 0 "$site" || true  # once, and not in each of the first processes
    export PYTHONPATH=$site
fi
exec "$python" -m tests.runs.gpu.check "$@"
