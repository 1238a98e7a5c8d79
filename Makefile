# Two commands for a new machine with Python 3.10+, a C++17 compiler and make: `make demo` and `make test`.
# Each sets up .venv first. PYTHON=python3.x chooses the interpreter, VENV=path the place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The install is editable: Python files run from the tree, beside the modules compiled into spark_fast/, so that tests
# and tree cannot differ. Only a change of these needs a new install:
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test bench gpu-check lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

# A process for each core, four at most, takes file by file. Their threads leave the core to others while they wait.
test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

BENCH := $(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,rounds --benchmark-json

bench: $(VENV)/.installed-bench
	$(BENCH)=bench/results/cpu.json -k "not pixel_masks"
	SPARK_FAST_BENCH_ALLOCATOR=default $(BENCH)=bench/results/cpu-default-allocator.json -k headline
	$(BENCH)=bench/results/cpu-pixels.json -k pixel_masks
	$(BIN)/python -m bench.report

# On a machine with a GPU, with whatever Python has torch and triton there: nothing is installed but this package.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.* csrc/cuda_shim/*

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/cuda_shim/*

clean:
	rm -rf $(VENV) build dist *.egg-info spark_fast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find spark_fast tests bench examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
