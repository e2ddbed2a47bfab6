# `make demo` and `make test` work on a fresh machine: they make their own environment in .venv.
# Variables: PYTHON (3.11 or newer), VENV, PYTEST_ARGS, DEMO_ARGS, MUTANTS, GPU_ARGS, SITE.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
MUTANTS ?=
GPU_ARGS ?=
SITE ?= build/site
BIN = $(VENV)/bin
# Without an NVIDIA GPU, constraints.txt keeps pip from fetching the CUDA build of torch.
CONSTRAINTS := $(shell nvidia-smi -L >/dev/null 2>&1 || echo "--constraint constraints.txt")
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)
INSTALLED = $(VENV)/.installed

.PHONY: help demo test lint types contracts house mutants bench docs release-check gpu wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train two small networks on real images, measure their curvature, write demo.html"
	@echo "make test       the default test suite (a few minutes)"
	@echo "make lint       ruff        make types      mypy --strict, and what a user's mypy sees        make contracts  import layers"
	@echo "make house      modules by layer with their sizes, and what breaks the architecture's rules; brings docs/architecture.md up to date"
	@echo "make mutants    do the tests notice a changed line of the numerical core? (20 minutes) MUTANTS=\"--seed 1\" takes another sample"
	@echo "make docs       the documentation site, in build/site/index.html        make release-check  version, changelog, wheel and sdist"
	@echo "make bench      comparisons with other libraries        make wheel      dist/*.whl        make clean"
	@echo "make gpu        the gpu tests and what curvature costs on this machine's GPU, with its own torch (6 minutes); docs/gpu.md"

demo: $(INSTALLED)-demo
	$(BIN)/python -m sharpkit demo $(DEMO_ARGS)

test: $(INSTALLED)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(INSTALLED)-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED)-dev $(INSTALLED)-test
	$(BIN)/mypy && $(BIN)/python -m pytest -q -m slow tests/test_types.py

contracts: $(INSTALLED)-dev
	$(BIN)/lint-imports

# Standard library alone: needs no environment.
house:
	$(PYTHON) tools/house.py --write docs/architecture.md

# Tests of a sample of mutants; tools/mutants.py says what can be asked for in MUTANTS.
mutants: $(INSTALLED)-test $(INSTALLED)-mutants
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(MUTANTS)

bench: $(INSTALLED)-test $(INSTALLED)-bench
	$(BIN)/python -m pytest -m bench $(PYTEST_ARGS)

# The machine's own Python and torch, the checkout on its path: makes no environment and fetches nothing. 330 s of six minutes, the
# rest is for starting up and for the product that is running when the time ends.
gpu:
	@$(PYTHON) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null \
	  || { echo "make gpu needs an NVIDIA GPU and a Python with torch, and $(PYTHON) has no torch; name another: make gpu PYTHON=..." >&2; exit 2; }
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m experiments.gpu_benchmark --tests --max-seconds 330 $(GPU_ARGS)

# mkdocs-material with mkdocstrings: the pages are Markdown as they are, the reference is read from the docstrings without importing
# anything, and the site needs no network. strict: a warning is an error.
docs: $(INSTALLED)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir $(abspath $(SITE))

# Asks nothing of anybody: what is released, and when, is up to a person. TAG=v0.2.0 checks its form too.
release-check: $(INSTALLED)-dev docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel
	$(BIN)/python tools/release_check.py $(if $(TAG),--tag $(TAG))

wheel: $(VENV)/.ready
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis demo.html

# One stamp for each extra, so that repeated calls install nothing.
$(INSTALLED)-%: $(VENV)/.ready pyproject.toml constraints.txt
	@echo "Installing sharpkit[$*] into $(VENV) (the first time takes a minute or two) ..."
	$(PIP) --editable ".[$*]"
	@touch $@

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "sharpkit needs Python 3.11 or newer; $(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	@touch $@
