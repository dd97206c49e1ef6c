# For everybody:  make prune   the environment, then the main job on the embedded digits
#                 make test    the quick tests, no GPU needed
# Developers:     make test-slow soak lint ext bench evidence kernels gpu-package gpu clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cu)
# native builds get the toolkit that has headers, not whatever nvcc happens to be on the PATH
WITH_TOOLKIT = CUDA_HOME="$$($(BIN)/python vitprune_fast/_toolkit.py)"; export CUDA_HOME; \
	if [ -z "$$CUDA_HOME" ]; then VITPRUNE_WITH_CUDA="$${VITPRUNE_WITH_CUDA:-0}"; export VITPRUNE_WITH_CUDA; fi;
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: prune test test-slow soak oldest oldest-installed lint ext bench evidence kernels gpu gpu-package clean
.DELETE_ON_ERROR:

prune: $(VENV)/.package
	$(BIN)/vitprune-fast run --out runs/digits

test: $(VENV)/.package
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.package oldest
	$(PYTEST) -n 2 --maxschedchunk 1 -m "slow and not gpu"

# 200,000 images through a loader: memory stays flat, no file or process is left
soak: $(VENV)/.package
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.soak

# the lower bounds of pyproject.toml, installed beside .venv: quick tests, and every kernel compiled
oldest: $(VENV)/.package
	$(BIN)/python -m tests.oldest

oldest-installed: $(VENV)/.package
	$(BIN)/python -m tests.oldest --install

lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

ext: $(VENV)/.package
	$(WITH_TOOLKIT) $(BIN)/python setup.py build_ext --inplace

bench: $(VENV)/.package
	$(PYTEST) bench -m "not gpu" -p no:xdist
	$(BIN)/python bench/table.py

# what recipes keep, beside others: docs/results/. It ends after BUDGET_S seconds, and goes on there
evidence: $(VENV)/.package
	BUDGET_S="$(BUDGET_S)" $(BIN)/python -m bench.evidence

# the machine code of every Triton kernel: compiled ahead of time, no GPU needed
kernels: $(VENV)/.package
	$(BIN)/python -m tests.compiled

# both install nothing. gpu: with the interpreter PYTHON of a machine that has a GPU, first PART=1,
# then what failed there again and the rest: PART=2 AGAIN=runs/gpu-1. gpu-package: native code for
# that machine, whose Python is FOR, and a list of what to take along
PART ?= 1
FOR ?= $(BIN)/python
gpu:
	$(PYTHON) bench/run_gpu.py --part $(PART) --out $(or $(OUT),runs/gpu-$(PART)) $(if $(AGAIN),--again $(AGAIN))

gpu-package: $(VENV)/.package
	$(BIN)/python -m bench.gpu_package --python $(FOR) $(if $(CANDIDATES),--candidates $(CANDIDATES))

clean:
	rm -rf build dist *.egg-info vitprune_fast/*.so .pytest_cache .ruff_cache .hypothesis

# torch and the build requirements come first and the build uses them (no isolation): torch is
# fetched once, and the native code is compiled against the torch it will run with
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: PYTHON must be Python 3.10 or newer, got $$($(PYTHON) --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch torchvision "setuptools>=77.0.1" wheel ninja "pybind11>=2.13"
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(CXX_FILES)
	$(WITH_TOOLKIT) $(BIN)/python -m pip install -q --no-build-isolation -e '.[report,digits,test,lint]'
	touch $@
