# Two commands are all a newcomer needs; each makes .venv first if need be, and a second call installs nothing again.
#
#   make demo      train on the embedded digits (2 to 6 minutes of two cores), print the test accuracy
#   make test      run the test suite (some minutes on two cores)
#   make coverage  the same with the coverage of src, which takes half as long again
#   make bench     fail if the fast path isn't well ahead of the plain one on this machine (half a minute)
#   make faults    the long tests: those of killed, starved and restarted runs, which write results/faults.csv, and
#                  all others that are marked slow, which make test leaves out; and the fuzzers with 20 times the cases
#   make lint      format, lint and types; changes nothing
#   make format    put the format right
#   make install   .venv with every extra, nothing else
#   make build     source archive, and wheel with compiled kernels, in dist/
#   make figures   draw the figures of docs/images again
#   make docs      the site of docs/, into site/
#   make screenshots  take those of the page (transcnn demo) again; needs chromium
#   make clean     remove .venv and everything that was built (runs/ stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
INSTALL := $(PIP) --constraint constraints.txt --editable
# A stamp is younger than both files below as long as what it stands for is installed.
PINS := pyproject.toml constraints.txt
EVERYTHING := $(VENV)/.installed-all
# Two processes, each with one thread, are faster on two cores than one process with two threads.
WORKERS ?= 2
# Each process takes files in order, so that most fixtures of a file or a session are made once; who is done helps.
# Threads that wait for each other sleep meanwhile, as tests of several threads share cores with other processes.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
PARALLEL := $(PYTEST) -n $(WORKERS) --dist worksteal

FUZZERS := tests/attacks tests/test_fuzz.py tests/test_cli_fuzz.py tests/test_fast_property.py

.PHONY: help demo test coverage bench faults lint format install build figures docs screenshots clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "transcnn needs Python 3.10 or newer; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "Python has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)

# A set that a larger one brought already needs no pip: its stamp alone is missing.
UNLESS = @for larger in $(1); do \
    if [ $$larger -nt pyproject.toml ] && [ $$larger -nt constraints.txt ]; then touch $@; exit 0; fi; done; \
    echo "Installing what the $(2) needs into $(VENV) (once, some minutes) ..."; \
    $(INSTALL) "$(3)" && touch $@

$(VENV)/.installed-train: $(PINS) | $(BIN)/pip
	$(call UNLESS,$(VENV)/.installed-dev $(EVERYTHING),demo,.[train])

$(VENV)/.installed-dev: $(PINS) | $(BIN)/pip
	$(call UNLESS,$(EVERYTHING),test suite,.[dev])

$(EVERYTHING): $(PINS) | $(BIN)/pip
	@echo "Installing every extra into $(VENV) (once, some minutes) ..."
	$(INSTALL) ".[dev,docs]"
	@touch $@

install: $(EVERYTHING)

demo: $(VENV)/.installed-train
	$(BIN)/transcnn train --config recipes/digits.yaml

test: $(VENV)/.installed-dev
	$(PARALLEL)

# Python's tracing makes the exporters, pure Python that walks through graphs, almost twice as slow.
coverage: $(VENV)/.installed-dev
	$(PARALLEL) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/ratio.py
	if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python benchmarks/ratio.py; fi

faults: $(VENV)/.installed-dev
	TRANSCNN_FAULTS=results/faults.csv $(PYTEST) tests/faults -m 'slow or not slow'
	$(PARALLEL) tests --ignore tests/faults -m slow
	TRANSCNN_FUZZ_CASES=20000 TRANSCNN_CASES=600 $(PARALLEL) $(FUZZERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: $(VENV)/.installed-dev
	$(PIP) build
	TRANSCNN_WHEEL_KERNELS=1 $(BIN)/python -m build

figures: $(VENV)/.installed-train
	$(BIN)/python docs/make_figures.py

docs: $(EVERYTHING)
	$(BIN)/mkdocs build --strict

screenshots: $(VENV)/.installed-dev
	TRANSCNN_SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/test_demo.py

clean:
	rm -rf $(VENV) build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
