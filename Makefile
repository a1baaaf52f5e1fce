# Every target sets up what it needs on a machine that has Python 3.11 or later, and can be run in any order
# and again. pip's own settings (PIP_INDEX_URL and the like) are honoured.

# The first interpreter that will do; constraints.txt was made with 3.11.
SUITS := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c '$(SUITS)' >/dev/null 2>&1 && echo "$$python" && break; done)
WORKERS ?= 2
PYTEST_ARGS ?=
PEERS_ARGS ?=

VENV := .venv
CORE_VENV := .venv-core
READY := $(VENV)/.installed
CORE_READY := $(CORE_VENV)/.installed
PEERS_READY := $(VENV)/.peers-installed
DECLARED := pyproject.toml constraints.txt requirements/oracles.txt

# Editable, without build isolation: setuptools is pinned like everything else, and nothing else is fetched.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL_BUILD_TOOLS := $(PIP_INSTALL) --upgrade pip setuptools
INSTALL_PACKAGE := $(PIP_INSTALL) --no-build-isolation --editable

.DELETE_ON_ERROR:
.PHONY: help setup demo test core-test lint types format bench bench-peers lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with the package, every extra and the test tools

demo: $(READY) ## train the XOR experiment, record it and write its report under runs/demo
	$(VENV)/bin/hild-xr reproduce xor --out runs/demo

test: $(READY) ## run every test and docstring example; PYTEST_ARGS="-k angles" chooses, WORKERS=1 runs in one process
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

core-test: $(CORE_READY) ## run the tests that need neither torch nor a plotting library, where neither is installed
	$(CORE_VENV)/bin/python -c "from importlib.util import find_spec; \
		found = [p for p in ('torch', 'holoviews', 'bokeh', 'panel', 'matplotlib') if find_spec(p)]; \
		assert not found, f'the core-only environment holds {found}'; \
		import hild_xr, hild_xr.analysis"
	$(CORE_VENV)/bin/hild-xr --help >/dev/null
	$(CORE_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(READY) ## check style, docstrings and formatting
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(READY) ## check types, strictly
	$(VENV)/bin/mypy

format: $(READY) ## format the code and apply the safe fixes
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(PEERS_READY) ## run the benchmarks, alone and on one thread
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only $(PYTEST_ARGS)

bench-peers: $(PEERS_READY) ## print how long curvature takes here and in other packages; PEERS_ARGS="T1 --states M100" chooses
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.benchmarks.peer_table $(PEERS_ARGS)

lock: $(READY) ## write what is installed now into constraints.txt
	{ grep '^#' constraints.txt; $(VENV)/bin/python -m pip freeze --all --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove environments, caches and build products; recorded runs stay
	rm -rf $(VENV) $(CORE_VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf hild_xr.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(CORE_VENV)/bin/python:
	@"$(PYTHON)" -c '$(SUITS)' 2>/dev/null || { \
		echo 'hild-xr needs a Python from 3.11 on that can create virtual environments; "$(PYTHON)" does not do.' >&2; \
		echo 'On Debian and Ubuntu install python3 and python3-venv, or name another: make PYTHON=/path/to/python3' >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(@D:/bin=)

$(READY): $(DECLARED) | $(VENV)/bin/python
	$(VENV)/bin/python $(INSTALL_BUILD_TOOLS)
	$(VENV)/bin/python $(INSTALL_PACKAGE) '.[all,dev]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-warn-conflicts -r requirements/oracles.txt
	@touch $@

# Without their dependencies, as the oracles: torchvision, which is asked for and not used, brings a CUDA torch.
PEERS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])
$(PEERS_READY): $(READY)
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-warn-conflicts $$($(VENV)/bin/python -c '$(PEERS)')
	@touch $@

$(CORE_READY): $(DECLARED) | $(CORE_VENV)/bin/python
	$(CORE_VENV)/bin/python $(INSTALL_BUILD_TOOLS)
	$(CORE_VENV)/bin/python $(INSTALL_PACKAGE) '.[test]'
	@touch $@
