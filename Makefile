# Everything there is to do here; `make` alone lists it. A venv in .venv is made first, and Debian's packages are
# installed where that is possible. Another Python: make test PYTHON=python3.12
#   make run ARGS="--capture=none"    more flags for the proxy
#   make test ARGS="-k udp"           more options for pytest
#   make bench ARGS="--only udp --rounds 1"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# What is installed: for running, for testing, for measuring. Made anew when the dependencies change, or the Python.
FOR_RUN := $(VENV)/.run-$(VERSION)
FOR_TEST := $(VENV)/.test-$(VERSION)
FOR_BENCH := $(VENV)/.bench-$(VERSION)
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help run test bench lint docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make run     serve the example Services, with a few endpoints to talk to'
	@echo 'make test    all checks and tests'
	@echo 'make bench   measure, beside HAProxy, nginx and socat'
	@echo 'make lint    the checks alone: style, types, imports'
	@echo 'make docs    write the pages that are made from code'
	@echo 'make clean   remove what all this made'

run: $(FOR_RUN)
	@.ci/packages run
	@$(BIN)/python examples/demo.py $(ARGS)

test: lint
	@.ci/packages test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(FOR_BENCH)
	@.ci/packages bench
	$(BIN)/python -m bench $(ARGS)

lint: $(FOR_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(FOR_RUN)
	$(BIN)/python -m userspace_proxy.manual >docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,REQUIREMENT): into a venv of this very Python.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"userspace-proxy needs Python 3.11 or newer, $(PYTHON) is $(VERSION); name another: make PYTHON=python3.12 ...")'
	@.ci/packages build $(PYTHON)
	@test "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$(VERSION)" \
		|| $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '$(1)'
endef

$(FOR_RUN): setup.cfg pyproject.toml
	$(call install,.)
	@touch $@

$(FOR_TEST): setup.cfg pyproject.toml
	$(call install,.[test])
	@touch $(FOR_RUN) $@

$(FOR_BENCH): setup.cfg pyproject.toml
	$(call install,.[bench])
	@touch $(FOR_RUN) $@
