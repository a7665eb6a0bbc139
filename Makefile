# `make help` lists the targets. Variables:
#   PROFILE=mini        a file in profiles/
#   PY=python           the Python of an existing environment to use instead of .venv
#   PYTHON=python3.11   the Python that creates .venv
#   PIP_OPTIONS=...     further options for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu
#                       (a torch without CUDA, which is much smaller)
#   SAE=... HOST=...    for `make audit`: an SAE (file, folder, Hub id) and its model; RECORDS=file: the author's rows
#   GRID=cells          for `make sweep`: a file in profiles/sweeps/
#   JOBS=2              notebooks that run at the same time (1 unless the profile is mini or smoke)

.DELETE_ON_ERROR:
ifneq ($(origin PARALLEL),command line)
.NOTPARALLEL:
endif
.DEFAULT_GOAL := help
SHELL := /bin/bash

# glibc keeps freed memory for the next tensor, because new memory costs a page fault per 4 KiB.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 2147483647
export MALLOC_ARENA_MAX := 1

# The processes of one run share its lock.
ifndef WRITESAE_RUN
export WRITESAE_RUN := $(shell echo $$PPID-$$(date +%s))
endif

# `make test` takes the profile smoke unless one is given.
TESTED := $(or $(PROFILE),smoke)
PROFILE ?= mini
JOBS ?= $(if $(filter mini smoke,$(PROFILE)),2,1)
ifneq ($(words $(PROFILE)),1)
$(error The name of a profile is one word, not '$(PROFILE)')
endif
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
PY = .venv/bin/python
ENV := $(if $(filter command,$(firstword $(origin PY))),,.venv/.complete)

# Each value that a user gives is one word of the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
override PY := $(call quoted,$(PY))
BASE := $(call quoted,$(or $(PYTHON),python3))

# These are given to one call of Make; a variable of the environment that has the name is another one.
RUN :=
EXACT :=
BENCH :=

# All processes run the code of this folder and read and write UTF-8, whatever the user's settings are.
export PYTHONPATH := $(CURDIR)$(if $(ENV),,$(if $(PYTHONPATH),:$(PYTHONPATH)))
export PYTHONUTF8 := 1
unexport PYTHONOPTIMIZE PYTHONSTARTUP PYTHONWARNINGS

NAMES := $(sort $(shell $(BASE) -I replication/commands/order.py --order 2>/dev/null))
STAMPS := build/$(PROFILE)/stamps
SOURCES := $(shell find writesae replication -name '[!.]*.py' ! -path '* *')
RECIPES := $(filter models/%/recipe.yaml,$(wildcard models/*/recipe.yaml))

.PHONY: help env all pages figures dryrun test test-unit test-notebooks test-reference verify lint bench hosts browser readme site sweep audit repeats lab clean always $(NAMES)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s%s\n", $$1, $$2}' Makefile
	@echo "  and one for each notebook: $(NAMES)"
	@echo "PROFILE=name chooses one of: $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)) (now $(PROFILE))"

env: $(ENV)  ## create the environment in .venv

.venv/.complete: pyproject.toml requirements.lock
	@$(BASE) -c '$(FITS)' || { \
	    echo "This project needs Python 3.11 or 3.12: name one with 'make env PYTHON=/path/to/python3.11'." >&2; exit 2; }
	$(BASE) -I -m venv .venv
	.venv/bin/python -I -m pip install $(PIP_OPTIONS) -c requirements.lock -e '.[dev]'
	@touch $@

# Threads that wait for work do not spin, because the cores have other notebooks to run.
PAGES = --no-print-directory -j$(JOBS) PARALLEL=yes OMP_WAIT_POLICY=PASSIVE pages

# The pages that will run, which each run counts in its last line.
PENDING = $$($(MAKE) -n $(PAGES) PAGE='echo page $$*' 2>/dev/null | sed -n 's/^echo page //p' | tr '\n' ' ')

all:  ## run all outdated notebooks: results, figures, and their outputs
	@WRITESAE_PAGES="$(PENDING)" $(MAKE) $(PAGES) $(if $(filter 1,$(JOBS)),,OPTIONS=--log)
	@echo "All pages of the profile $(PROFILE) are up to date. Open first:"
	@echo "  build/$(PROFILE)/notebooks/05_replacement.ipynb  the main test"
	@echo "  figures/$(PROFILE)/fig05_win_rates.png           its figure"
	@echo "  results/$(PROFILE)/scorecard.csv                 every claim of the paper"

pages: $(addprefix $(STAMPS)/,$(NAMES))

figures: all  ## the same as all; redraws missing or outdated figures from stored results

dryrun: $(ENV)  ## test every notebook at the profile's shapes, with random weights and tiny counts
	$(PY) -m replication dryrun --profile $(PROFILE)

$(NAMES): %: $(STAMPS)/%

OPTIONS :=
RUN_PAGE = $(PY) -m replication run $* --profile $(PROFILE) $(OPTIONS)
# Outputs are those of mini: with another profile, only cells with the tag nbval-check-output are compared.
CHECK_PAGE = $(PY) -m pytest -p no:xdist -p no:cacheprovider -x -v --nbval$(if $(filter mini,$(PROFILE)),,-lax) \
    --nbval-current-env --nbval-cell-timeout 3600 --profile $(PROFILE) notebooks/$*.ipynb
PAGE = $(RUN_PAGE)

# A stamp has the time at which its run began, so a source edited during the run is newer. During the run its
# name contains the process id of this make (bash's PPID), so that a second make, which is refused, cannot
# change it.
$(addprefix $(STAMPS)/,$(NAMES)): $(STAMPS)/%: requirements.lock $(SOURCES) profiles/$(PROFILE).yaml | $(ENV)
	@mkdir -p $(STAMPS) && touch $@.$$PPID
	@$(PAGE)
	@mv $@.$$PPID $@

test: test-text test-unit test-notebooks test-reference  ## unit tests; every notebook, tiny (PROFILE=mini: as published, an hour)

OTHER_TEXT = The committed results are of another text. make test-unit, make all and make verify run with this one.

test-text: $(ENV)  ## check that the text, the docstrings of Python and packages, is that of the committed results
	@$(PY) -c 'import sys; from replication.study.docstrings import check_manifest as differs; \
	    sys.exit("$(OTHER_TEXT)" if differs("models/gated_deltanet/corpus.json") else 0)'

test-unit: $(ENV)  ## run only the unit tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests

test-notebooks:  ## run all notebooks with nbval into build/test
	rm -rf build/test
	WRITESAE_OUTPUT=build/test $(MAKE) $(PAGES) PROFILE=$(TESTED) STAMPS=build/test/stamps PAGE='$$(CHECK_PAGE)'

test-reference: $(ENV)  ## compare the tables in build/test with those of the last commit
	$(PY) -m replication verify --profile $(TESTED) --run build/test

verify: $(ENV)  ## compare results/PROFILE (or RUN=folder) with the last commit (EXACT=--exact: bitwise)
	$(PY) -m replication verify --profile $(PROFILE) $(if $(RUN),--run $(call quoted,$(RUN))) $(EXACT)

lint: $(ENV)  ## check style, format and the directions of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, no_cache=True))'

bench: $(ENV)  ## measure speed, memory and storage in 20 minutes (BENCH=--quick: smoke test)
	$(PY) benchmarks/run.py $(BENCH)

hosts: $(ENV)  ## retrain the embedded hosts from their recipes (hours; resumable)
	$(PY) -m replication train-host $(RECIPES:/recipe.yaml=)

browser: $(ENV)  ## write figures/PROFILE/atoms.html, a page with every atom (after `make all`)
	$(PY) -m replication browser --profile $(PROFILE)

site: $(ENV)  ## build the site into build/site (first: .venv/bin/pip install -c requirements.lock -e '.[site]')
	NO_MKDOCS_2_WARNING=1 $(PY) -m replication site

readme: $(ENV)  ## write the numbers of README.md and docs/ from results/mini
	$(PY) -m replication readme

GRID ?= cells

sweep: $(ENV)  ## train and test the SAEs of profiles/sweeps/GRID.yaml (resumable)
	$(PY) -m replication sweep --profile $(PROFILE) --grid $(call quoted,profiles/sweeps/$(GRID).yaml)

SAE :=
HOST :=
RECORDS :=

audit: $(ENV)  ## test a published SAE (SAE=file, folder or Hub id; HOST=its model; RECORDS=the author's rows)
	$(PY) -m replication audit --profile $(PROFILE) --sae $(call quoted,$(SAE)) --host $(call quoted,$(HOST)) \
	    $(if $(RECORDS),--records $(call quoted,$(RECORDS)))

REPEATS = $(patsubst profiles/%.yaml,%,$(filter profiles/%.yaml,$(wildcard profiles/$(PROFILE)-[0-9]*.yaml)))

repeats: $(ENV)  ## run all with each seed of profiles/PROFILE-*.yaml (hours; RUN=folder adds a run)
	for profile in $(REPEATS); do $(MAKE) all PROFILE=$$profile || exit 1; done
	$(PY) -m replication repeats --profile $(PROFILE) $(REPEATS:%=results/%) $(if $(RUN),$(call quoted,$(RUN)/results/$(PROFILE)))

lab: $(ENV)  ## open JupyterLab in the environment
	env -u JUPYTER_PATH JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab notebooks

clean:  ## remove build/ (intermediate files and stamps); results and figures stay
	rm -rf build

# All goals except these need the dependencies between notebooks.
ifneq ($(filter-out help env dryrun test test-% verify lint bench hosts browser readme site sweep audit repeats lab clean,$(or $(MAKECMDGOALS),help)),)
ifeq ($(wildcard profiles/$(PROFILE).yaml),)
$(error There is no profile '$(PROFILE)': choose one of $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)))
endif

# The file is renamed only when it is complete. Otherwise, after a kill, make would use a partial list of rules.
build/deps.mk: notebooks $(NAMES:%=notebooks/%.ipynb) replication/commands/order.py
	@mkdir -p build
	@$(BASE) -I replication/commands/order.py > $@.$$$$ && mv $@.$$$$ $@ || { rm -f $@.$$$$; exit 2; }

include build/deps.mk
endif
