# make demo: install what kvtwin needs into .venv, then run the main job.
# make test: add the test tools, then format, lint, types and tests. The other targets are named below.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-browser bench lint clean

# Another environment of the caller's must not reach into .venv.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

# Tried in this order; `make PYTHON=/path/to/python test` names another one.
PYTHON ?= python3.13 python3.12 python3.11 python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# A process per core, up to four; a file stays in one process, where its tests share what is compiled.
PYTEST := $(BIN)/python -m pytest --ignore=tests/benchmarks -n logical --maxprocesses=4 --dist=loadfile

# Prints the first Python that is new enough and can make an environment, or says what was found instead.
define FIND_PYTHON
found=""; \
for name in $(PYTHON); do \
  version=$$("$$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
  if ! "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
    found="$$found $$name=$$version"; \
  elif ! "$$name" -c 'import ensurepip, venv' 2>/dev/null; then \
    found="$$found $$name=$$version(without-venv)"; \
  else python="$$name"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "kvtwin needs Python 3.11 or newer with its venv module; tried $(PYTHON); found:$${found:- none}." >&2; \
  echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
  exit 1; \
fi
endef

demo: .venv/base.stamp
	$(BIN)/kvtwin demo

test: lint
	$(PYTEST) -m "not slow and not gpu and not ray and not browser and not lm_eval"

test-slow: .venv/test.stamp
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "slow and not gpu and not ray and not browser and not lm_eval"

test-browser: .venv/browser.stamp
	$(BIN)/python -m pytest tests/browser -m browser

bench: .venv/test.stamp
	# Optimised, and without the type checker, which would be measured with the rest.
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest tests/benchmarks --benchmark-only -o addopts=--import-mode=importlib
	$(BIN)/kvtwin bench

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps go first and come back last, so that an interrupted installation is taken up again.
.venv/base.stamp: pyproject.toml constraints.txt
	@rm -f .venv/*.stamp
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(FIND_PYTHON); \
	  echo "making .venv with $$("$$python" --version)"; \
	  "$$python" -m venv --clear .venv; \
	fi
	$(PIP_INSTALL) -e .
	@touch $@

.venv/test.stamp: .venv/base.stamp
	@rm -f $@
	$(PIP_INSTALL) --quiet -e '.[test,judges]'
	@touch $@

.venv/browser.stamp: .venv/test.stamp
	@rm -f $@
	$(PIP_INSTALL) --quiet -e '.[browser]'
	@touch $@
