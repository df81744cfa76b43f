# Loopwright: `make help` lists the targets. The first use of one sets up .venv; later uses need no network.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON  ?= python3
WORKERS ?= 3
BIN     := .venv/bin
READY   := .venv/.installed
BENCH   := .venv-bench/.installed
TRACKERS := .venv-trackers/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS := 1
unexport PYTHONDONTWRITEBYTECODE # each of the hundreds of processes of the suite would compile all of the source

.PHONY: help demo test check trackers nightly bench gpu reliability capabilities api clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(READY) ## train something and show what came of it
	@$(BIN)/python examples/demo.py

test: check ## set-up, all gates and the suite, slow tests included
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --ignore tests/test_docs.py

check: $(READY) ## style, types, layers, and the code in docstrings and docs
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "to fix: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q --doctest-modules src
	@$(BIN)/python -m pytest -q tests/test_docs.py

trackers: $(TRACKERS) ## the loggers of TensorBoard, MLflow, W&B, Comet, Neptune, Visdom, Polyaxon against the real packages, offline
	@.venv-trackers/bin/python -m pytest -q --doctest-modules src/loopwright/loggers tests/trackers

nightly: check ## the suite with all that takes too long for every change, and what a step, a fit and the import cost
	@$(BIN)/python -m pytest -q -m "" -n $(WORKERS) --dist worksteal --ignore tests/test_docs.py
	@$(BIN)/python benchmarks/overhead.py --only costs

bench: $(BENCH) ## measure the loop against a hand-written one and against other frameworks
	@.venv-bench/bin/python benchmarks/overhead.py
	@.venv-bench/bin/python benchmarks/models.py
	@.venv-bench/bin/python benchmarks/techniques.py
	@.venv-bench/bin/python benchmarks/compiled.py
	@.venv-bench/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/ddp.py

gpu: ## on a CUDA machine: the GPU tests, then benchmarks/gpu.py writes docs/benchmarks-gpu.md (PYTHON=... that has torch)
	@$(PYTHON) -c 'import torch' 2>/dev/null || { \
	  echo "$(PYTHON) has no torch; name one that has it, with CUDA: make PYTHON=... gpu" >&2; exit 2; }
	@PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --check
	@PYTHONPATH=src $(PYTHON) -m pytest -q -rs -m gpu $$(grep -rlF --include='test_*.py' 'mark.gpu' tests)
	@PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --write

reliability: $(READY) ## try to spoil runs, count what was spoiled (ROWS="R1 D4"), write docs/reliability.md (QUICK=--quick: a sample, to build/)
	@$(BIN)/python -m reliability.run $(QUICK) $(ROWS)

capabilities: $(TRACKERS) ## run every test that proves a capability and write docs/capabilities.md from those that pass
	@.venv-trackers/bin/python -m pytest -q -m capability tests/test_docs.py --capabilities=build/in_docs.json
	@.venv-trackers/bin/python -m pytest -q -m capability -n $(WORKERS) --dist worksteal --ignore tests/test_docs.py \
	  --capabilities=build/in_tests.json
	@$(BIN)/python tools/capabilities.py build/in_docs.json build/in_tests.json docs/capabilities.md

api: $(READY) ## write docs/api from the docstrings, and record the public surface in tests/api.txt
	@$(BIN)/python tools/api.py docs/api tests/api.txt

clean: ## remove caches and builds; environments and runs stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests tools examples benchmarks reliability -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch first and pinned: resolved freely, pip takes the newest build with all of CUDA
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Loopwright needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(@D) (once; some minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python tools/groups.py $(1) > $(@D)/requirements.txt
	@$(@D)/bin/pip install -qq "$$(grep '^torch==' constraints.txt)"
	@$(@D)/bin/pip install -qq -c constraints.txt -r $(@D)/requirements.txt
	@$(@D)/bin/pip install -qq -c constraints.txt --no-build-isolation -e '$(2)'
	@touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install,dev,.[all])

# on top of .venv, so that torch is there once and stays as it is
$(TRACKERS): $(READY) tests/trackers/clients.txt
	@echo "setting up $(@D) (once; a minute)"
	@test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/under.pth"
	@$(@D)/bin/python -m pip uninstall -qq -y setuptools # an old one that venv brings would hide that of .venv
	@$(@D)/bin/python tools/groups.py trackers > $(@D)/requirements.txt
	@$(@D)/bin/python -m pip install -qq -c constraints.txt -r $(@D)/requirements.txt
	@echo 'setuptools<81' > $(@D)/build.txt # Visdom, which is built from source, needs pkg_resources for that
	@PIP_CONSTRAINT=$(CURDIR)/$(@D)/build.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/$(@D)/build.txt \
	  $(@D)/bin/python -m pip install -qq --no-deps -r tests/trackers/clients.txt # those of the plug-ins, last
	@touch $@

$(BENCH): pyproject.toml constraints.txt
	$(call install,bench build,.)
