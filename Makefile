# Neuronscope. Two commands matter: `make demo` and `make test`. Each makes .venv if it is missing and installs what it
# needs; a second run finds it there and is quick. The rest is what .ci/run runs, one target a check.
#
#   PYTHON=python3.12   which Python makes .venv (3.10 or newer)
#   TORCH_ARGS=...      added to the `pip install` of torch. On Linux, pip's ordinary torch brings several GB of CUDA;
#                       for the CPU build name the PyTorch project's own index of CPU wheels:
#                       make demo TORCH_ARGS="--index-url <that index>". Not needed on macOS and Windows.
#   PIP_ARGS=...        added to every `pip install`
#   PYTEST_ARGS=...     added to pytest (-x, -k dead, -n 2, a path)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
TORCH_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install -c constraints.txt $(PIP_ARGS)

.PHONY: help demo test coverage tools apart lint format types imports doctest docs examples bench bench-peers wheel check browser lowest clean distclean

help:
	@echo "make demo      train the activation comparison on real data; leaves a table, a picture, TensorBoard logs, a report"
	@echo "make test      run the tests"
	@echo "make check     all that CI runs: test, coverage, lint, types, imports, doctest, docs, examples, wheel"
	@echo "make docs      build the documentation site into site/"
	@echo "make bench     measure the cost of watching, in less than ten minutes (make bench-peers: of others too)"
	@echo "make lowest    run the tests with the oldest versions that pyproject.toml allows"
	@echo "make format    let ruff put the code in order"
	@echo "make clean     remove what was made, but for .venv (make distclean removes that too)"

# ---- set-up: a stamp file in .venv for each step, made anew when what it was made from changes ----

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "Neuronscope needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Making the virtual environment $(VENV) failed; on Debian and Ubuntu, install the package python3-venv."; \
	  exit 1; } >&2
	@touch $@

# torch comes first and alone, pinned: whatever is installed after it finds it there and leaves it as it is.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(INSTALL) $(TORCH_ARGS) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) -e '.[dev]'
	@touch $@

# The documentation site reads the code without running it, so this needs no torch; but the extra brings the package.
$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[docs]'
	@touch $@

# torchvision and timm, for tests on networks of others. Apart from the rest and without their dependencies: the ordinary
# torchvision wants a CUDA build of torch, and beside a CPU build even `import torchvision` fails, which would take
# Lightning down with it (torchmetrics imports torchvision where it finds one). tests/conftest.py says how they are used.
$(VENV)/.networks: $(VENV)/.made requirements-networks.txt
	@rm -rf $(VENV)/networks
	$(PIP) install $(PIP_ARGS) --no-deps --target $(VENV)/networks -r requirements-networks.txt
	@touch $@

# The compiler of the GPU kernels, for tests that need no GPU: see requirements-triton.txt.
$(VENV)/.triton: $(VENV)/.made requirements-triton.txt
	@rm -rf $(VENV)/triton
	$(PIP) install $(PIP_ARGS) --no-deps --target $(VENV)/triton -r requirements-triton.txt
	@touch $@

# Tools that benchmarks compare with. Apart from the rest and without their dependencies but for those listed, so that no
# test meets them and torch stays as it is.
$(VENV)/.peers: $(VENV)/.test requirements-peers.txt
	@rm -rf $(VENV)/peers
	$(PIP) install $(PIP_ARGS) --no-deps --target $(VENV)/peers -r requirements-peers.txt
	@touch $@

# Files of others to examine: see requirements-specimens.txt.
$(VENV)/.specimens: $(VENV)/.made requirements-specimens.txt
	@rm -rf $(VENV)/specimens
	$(PIP) install $(PIP_ARGS) --no-deps --target $(VENV)/specimens -r requirements-specimens.txt
	@touch $@

browser:
	@scripts/ensure_chromium.sh

# ---- what one runs ----

demo: $(VENV)/.demo
	$(RUN) neuronscope demo --out $(OUT)

test: $(VENV)/.test $(VENV)/.networks $(VENV)/.specimens $(VENV)/.triton browser
	$(RUN) python -m pytest $(PYTEST_ARGS)

check: test coverage lint types imports doctest docs examples wheel

# docs/coverage.md: says whether the page is what the networks and the tests are now. `python scripts/coverage.py` writes it.
coverage: $(VENV)/.test $(VENV)/.networks
	$(RUN) python scripts/coverage.py --check

# What all checks need: the tests' packages, ruff, mypy, import-linter, and what builds the package and the site. At once,
# since each `pip install` builds this package anew.
tools: $(VENV)/.tools
$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[test,dev,docs]'
	@touch $(VENV)/.test $(VENV)/.dev $(VENV)/.docs $@

# What tests need that is no part of the environment, and can be installed while pip makes that.
apart: browser $(VENV)/.networks $(VENV)/.specimens $(VENV)/.triton

lint: $(VENV)/.dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.dev
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

types: $(VENV)/.dev
	$(RUN) mypy

imports: $(VENV)/.dev
	$(RUN) lint-imports

# neuronscope/callbacks is a link to callbacks/, so this reaches every public name. The kernels need triton, and have none.
doctest: $(VENV)/.test
	$(RUN) python -m pytest --doctest-modules -p no:cacheprovider neuronscope --ignore neuronscope/count/triton_kernels.py

# A warning is an error: a broken link or anchor, a page that is not in the navigation, a diagram without its picture.
docs: $(VENV)/.docs
	$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "The site is in site/: open site/index.html, or serve it: $(BIN)/mkdocs serve"

# PART=1/2: the first half of them.
examples: $(VENV)/.test $(VENV)/.specimens
	$(RUN) PYTHONPATH="$(abspath $(VENV))/specimens" python scripts/run_examples.py $(if $(PART),--part $(PART))

wheel: $(VENV)/.dev
	PIP_ARGS="$(PIP_ARGS)" scripts/check_wheel.sh $(BIN)/python

# docs/performance.md keeps what `python -m benchmarks --into docs/performance.md` prints: all of it, or a part's.
bench: $(VENV)/.test
	$(RUN) python -m benchmarks

bench-peers: $(VENV)/.peers
	$(RUN) python -m benchmarks peers planted

# The lower bounds in pyproject.toml, tried: the oldest Python and the oldest of each dependency. Not part of CI, since
# there torch's CPU build is at hand for one version only.
LOWEST_PYTHON ?= python3.10
lowest: $(VENV)/.made
	$(LOWEST_PYTHON) -m venv $(VENV)/lowest
	$(VENV)/lowest/bin/python -m pip install $(PIP_ARGS) $(TORCH_ARGS) -c constraints-lowest.txt torch
	$(VENV)/lowest/bin/python -m pip install $(PIP_ARGS) -c constraints-lowest.txt -e '.[test]'
	PATH="$(abspath $(VENV)/lowest/bin):$$PATH" python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf build dist site runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
