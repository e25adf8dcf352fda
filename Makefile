# One virtual environment, made from deploy/requirements-cpu.txt; every target brings it up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast test-all load load-fleet architectures compat fuzz generate dashboard-check lint format bench gpu-pack gpu-kernels bench-alignment bench-repair bench-admission bench-signing bench-serving bench-scan evidence attacks suspicion shares clean

demo: $(READY)  ## serve adapters on a real vLLM under the gate, and show what it did
	$(BIN)/python -m deploy.demo

# Compiled modules are kept, whatever the environment says: every engine starts a second sooner.
test test-fast test-all: export PYTHONDONTWRITEBYTECODE =

test: $(READY)  ## all tests that CI runs, in two processes that share the engines
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-fast: $(READY)  ## everything that needs no vLLM engine
	$(BIN)/python -m pytest -m "not serving"

test-all: $(READY)  ## those too that take longer than CI allows
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "slow or not slow"

load: $(READY)  ## hot loads and unloads under traffic on a real server: about ten minutes
	$(BIN)/python -m tests.runs.load

load-fleet: $(READY)  ## two thousand adapters, changing policies, a killed worker: an hour and a quarter; MINUTES=4 ADAPTERS=200 for a short one
	$(BIN)/python -m tests.runs.load.fleet

architectures: $(READY)  ## tiny models of many architectures, guarded beside stock vLLM: ten minutes; NAMES="Llama Qwen3"
	$(BIN)/python -m tests.runs.architectures $(NAMES)

compat: $(READY)  ## the doors on every vLLM that is claimed to work: some ten minutes and 4 GB each; VERSIONS="0.30 0.31"
	$(BIN)/python -m tests.runs.compat $(VERSIONS)

fuzz: $(READY)  ## hundreds of thousands of bent adapters and policies: about an hour
	FUZZ_EXAMPLES=200000 $(BIN)/python -m pytest tests/fuzz -p no:randomly

generate: $(READY)  ## write what in deploy/ is made from something else: dashboard, PrometheusRule
	$(BIN)/python -m deploy.generate

dashboard-check: $(READY)  ## each panel's query on a real Prometheus that watches a real guarded vLLM
	$(BIN)/python -m pytest tests/deploy -m "slow or not slow"

lint: $(READY)  ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## benchmarks; figures go to tests/runs/benchmarks/RESULTS.md
	$(BIN)/python -m tests.runs.benchmarks
	$(BIN)/python -m tests.runs.benchmarks.alignment
	$(BIN)/python -m tests.runs.benchmarks.repair
	$(BIN)/python -m tests.runs.benchmarks.sweep

gpu-pack: $(READY)  ## the folder .gpu, with which tests/runs/gpu/check.sh runs on a bare GPU machine: five minutes
	$(BIN)/python -m tests.runs.gpu.pack

gpu-kernels: $(READY)  ## what the CUDA kernels need of a GPU, by compiling them: five minutes, no GPU
	$(BIN)/python -m tests.runs.gpu.kernels

bench-alignment: $(READY)  ## alignment scorers beside MAS-SVD, and making a reference: two minutes, 6 GB of disk
	$(BIN)/python -m tests.runs.benchmarks.alignment

bench-repair: $(READY)  ## repairing an adapter beside scoring it: a minute
	$(BIN)/python -m tests.runs.benchmarks.repair

bench-admission: $(READY)  ## what the gate adds to loading an adapter: two servers, ten minutes
	$(BIN)/python -m tests.runs.benchmarks.admission

bench-signing: $(READY)  ## what verifying signatures and attestations adds to loading an adapter: a server, ten minutes
	$(BIN)/python -m tests.runs.benchmarks.signing

bench-serving: $(READY)  ## what adapters cost at inference, by how much is stripped: an engine and two servers, three quarters of an hour
	$(BIN)/python -m tests.runs.benchmarks.serving

bench-scan: $(READY)  ## scanning many adapters beside reading them: 5 GB of files, minutes
	$(BIN)/python -m tests.runs.benchmarks.sweep

evidence: $(READY)  ## what the index and a calibrated plan do on a real aligned model: up to 90 minutes, goes on where it was
	$(BIN)/python -m tests.runs.evidence

attacks: $(READY)  ## adapters of owners who know the gate, under each defence: some two hours, goes on where it was
	$(BIN)/python -m tests.runs.attacks

suspicion: $(READY)  ## what tells harmful adapters apart at admission: about an hour, goes on where it was
	$(BIN)/python -m tests.runs.attacks.suspicion

shares: $(READY)  ## the smallest share of an adapter's update that any module has, by training: half an hour on two idle cores, goes on where it was
	$(BIN)/python -m tests.runs.evidence.shares

$(READY): deploy/requirements-cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"the pinned environment is for Python 3.11, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --no-deps -r deploy/requirements-cpu.txt || { cat deploy/no-cpu-torch.txt >&2; exit 1; }
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .compat .evidence build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
