# Every target makes .venv first where it is missing, and refreshes it when pyproject.toml changes.
PYTHON ?= python3
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))

.PHONY: help demo test test-all lint docs
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo 'make demo      fit, reduce and shrink LeNet-5 on the embedded digits, into runs/demo'
	@echo 'make test      the quick tests'
	@echo 'make test-all  every test, those that take minutes or need the real data sets too'
	@echo 'make lint      ruff and mypy'
	@echo 'make docs      the documentation as a site, into build/docs'

.venv/installed: pyproject.toml
	@test -x .venv/bin/pip || { \
	  $(PYTHON) -c '$(IS_NEW_ENOUGH)' || { \
	    echo "pyro_bmrs needs Python 3.12 or newer, but '$(PYTHON)' is not. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 1; \
	  }; \
	  $(PYTHON) -m venv .venv; \
	}
	@.venv/bin/python -c '$(IS_NEW_ENOUGH)' || { \
	  echo "pyro_bmrs needs Python 3.12 or newer, but .venv was made with an older one. Remove .venv and try again." >&2; \
	  exit 1; \
	}
	.venv/bin/pip install -q -e '.[dev]'
	@touch $@

# One thread: a network this small is no faster with more, and what it ends with would depend on their number.
demo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/pyro-bmrs run models/lenet5.py --data digits --out runs/demo --draws 100 --require-removed 0.60 --require-accuracy 0.95

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile -m ''

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
