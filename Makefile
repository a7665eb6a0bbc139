# `make help` lists the targets. Variables:
#   PROFILE=mini        a file in profiles/
#   PY=python           use this Python, of an environment that is already there, instead of .venv
#   PYTHON=python3.11   the Python that .venv is made with
#   PIP_OPTIONS=...     further options for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu
#                       (a torch without CUDA, which is much smaller)
#   GRID=cells          for `make sweep`: a file in profiles/sweeps/
#   DASK=tcp://...      for `make sweep`: the address of a Dask scheduler, in place of processes of this machine

.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
SHELL := /bin/bash

# glibc keeps freed memory for the next tensor in place of mapping it afresh, which costs a page fault every 4 KiB.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 2147483647
export MALLOC_ARENA_MAX := 1

PROFILE ?= mini
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
PY = .venv/bin/python
ENV := $(if $(filter command,$(firstword $(origin PY))),,.venv/.complete)

NAMES := $(sort $(patsubst notebooks/%.ipynb,%,$(wildcard notebooks/*.ipynb)))
STAMPS := build/$(PROFILE)/stamps
SOURCES := $(shell find writesae replication -name '*.py')
RECIPES := $(wildcard models/*/recipe.yaml)

.PHONY: help env all figures dryrun test test-unit test-notebooks test-reference verify lint bench hosts browser sweep repeats lab clean always $(NAMES)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s%s\n", $$1, $$2}' Makefile
	@echo "  and one for each notebook: $(NAMES)"
	@echo "PROFILE=name chooses one of: $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)) (now $(PROFILE))"

env: $(ENV)  ## create the environment in .venv

.venv/.complete: pyproject.toml requirements.lock
	@$(or $(PYTHON),false) -c '$(FITS)' || { \
	    echo "This project needs Python 3.11 or 3.12: name one with 'make env PYTHON=/path/to/python3.11'." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_OPTIONS) -c requirements.lock -e '.[dev]'
	@touch $@

all: $(addprefix $(STAMPS)/,$(NAMES))  ## run whatever is not up to date: results, figures, notebooks with their outputs

figures: all  ## draw missing or stale figures again (the same runs as all; stored results are read, not computed again)

dryrun: $(ENV)  ## run every notebook with random weights of the profile's true shapes and tiny counts, into build/dryrun
	$(PY) -m replication.commands.dryrun --profile $(PROFILE)

$(NAMES): %: $(STAMPS)/%

# The stamp bears the time at which the run began: a source that is edited during the run is newer than it. Until then it
# has the process id of this make (bash's PPID) in its name: another make, which is refused, must not make it younger.
$(addprefix $(STAMPS)/,$(NAMES)): $(STAMPS)/%: requirements.lock $(SOURCES) profiles/$(PROFILE).yaml | $(ENV)
	@mkdir -p $(STAMPS) && touch $@.$$PPID
	@$(PY) -m replication.commands.run $* --profile $(PROFILE)
	@mv $@.$$PPID $@

test: test-unit test-notebooks test-reference  ## unit tests, every notebook from nothing, results against the reference

test-unit: $(ENV)  ## only the unit tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests

test-notebooks: $(ENV)  ## only the notebooks, run from nothing into build/test and compared with their kept outputs
	rm -rf build/test
	names="$$($(PY) -I replication/commands/order.py --order)" && \
	WRITESAE_OUTPUT=build/test $(PY) -m pytest -p no:xdist -x -v --nbval --nbval-current-env \
	    --nbval-cell-timeout 3600 $$(printf 'notebooks/%s.ipynb ' $$names)

test-reference: $(ENV)  ## only the comparison of build/test with results/mini
	$(PY) -m pytest -o addopts=--import-mode=importlib tests/reference

verify: $(ENV)  ## results/PROFILE (or those of RUN=folder) against the committed ones: a report (EXACT=--exact: bit for bit)
	$(PY) -m replication.commands.verify --profile $(PROFILE) $(if $(RUN),--run $(RUN)) $(EXACT)

lint: $(ENV)  ## check style and format with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(ENV)  ## measure speed, memory and storage (a quarter of an hour; BENCH=--quick only sees that it runs)
	$(PY) benchmarks/run.py $(BENCH)

hosts: $(ENV)  ## train the embedded hosts again, each from its recipe (hours; resumable)
	for recipe in $(RECIPES); do $(PY) -m replication.commands.train_host $$(dirname $$recipe) || exit 1; done

browser: $(ENV)  ## write figures/PROFILE/atoms.html, every atom on one page, from the results that are there
	$(PY) -m replication.commands.browser --profile $(PROFILE)

GRID ?= cells

sweep: $(ENV)  ## train and test the SAEs of a grid (GRID=name), on a Dask cluster where DASK=address is given (resumable)
	$(PY) -m replication.commands.sweep --profile $(PROFILE) --grid profiles/sweeps/$(GRID).yaml $(if $(DASK),--dask $(DASK))

REPEATS = $(patsubst profiles/%.yaml,%,$(wildcard profiles/$(PROFILE)-[0-9]*.yaml))

repeats: $(ENV)  ## the whole run with each seed of profiles/PROFILE-*.yaml, for page 12 (hours; resumable; RUN=folder: one more)
	for profile in $(REPEATS); do $(MAKE) all PROFILE=$$profile || exit 1; done
	$(PY) -m replication.commands.repeats --profile $(PROFILE) $(REPEATS:%=results/%) $(RUN:%=%/results/$(PROFILE))

lab: $(ENV)  ## open JupyterLab in the environment
	$(PY) -m jupyterlab notebooks

clean:  ## remove build/ (intermediate files, stamps); results and figures stay
	rm -rf build

# What needs the notebooks' dependencies: everything but the goals named here.
ifneq ($(filter-out help env dryrun test test-% verify lint bench hosts browser sweep repeats lab clean,$(or $(MAKECMDGOALS),help)),)
ifeq ($(wildcard profiles/$(PROFILE).yaml),)
$(error There is no profile '$(PROFILE)': choose one of $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)))
endif

# It appears whole or not at all: a kill must leave no part of the rules, which would pass for all of them.
build/deps.mk: notebooks $(wildcard notebooks/*.ipynb) replication/commands/order.py
	@mkdir -p build
	@$(or $(PYTHON),python3) -I replication/commands/order.py > $@.$$$$ && mv $@.$$$$ $@ || { rm -f $@.$$$$; exit 2; }

include build/deps.mk
endif
