# Three doors: make train, make test, make lessons. Each needs only make and Python 3.11 or newer, and builds its own .venv.

VENV   := .venv
PYTHON := $(VENV)/bin/python

# uv is quicker where it is there. It does not read pip's settings, so where a package index is set for pip, pip is used.
UV := $(if $(PIP_FIND_LINKS)$(PIP_INDEX_URL)$(PIP_EXTRA_INDEX_URL)$(PIP_NO_INDEX),,$(shell command -v uv 2>/dev/null))

# What each door adds to the runtime dependencies.
EXTRAS_train   :=
EXTRAS_test    := [dev]
EXTRAS_lessons := [lessons]

# What that brings, for the person who waits for it.
RUNTIME          := numpy, matplotlib, tqdm, safetensors and threadpoolctl
PACKAGES_train   := $(RUNTIME)
PACKAGES_test    := $(RUNTIME), and pytest, hypothesis, ruff, mypy and what else the tests need,
PACKAGES_lessons := $(RUNTIME), and JupyterLab,

.DEFAULT_GOAL := help
.PHONY: help train test lessons lint coverage ci clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.installed-train  ## train the default model (options: make train ARGS="--help")
	@$(PYTHON) -m minimoe train $(ARGS)

test: $(VENV)/.installed-test  ## run the quick tests on every core (options: make test ARGS="-k router")
	@$(PYTHON) -m pytest -n auto $(ARGS)

lessons: $(VENV)/.installed-lessons  ## open the first lesson in Jupyter
	@$(PYTHON) -m jupyter lab lessons/00_start_here.ipynb $(ARGS)

lint: $(VENV)/.installed-test  ## check style and types
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy

coverage: $(VENV)/.installed-test  ## say which lines and branches the quick tests do not reach
	@rm -f .coverage .coverage.*
	@$(PYTHON) -m coverage run -m pytest -q -n auto $(ARGS)
	@$(PYTHON) -m coverage combine --quiet
	@$(PYTHON) -m coverage report --fail-under=95
	@$(PYTHON) -m coverage report --fail-under=100 --include='minimoe/layers/*,minimoe/losses/*'

ci:  ## run everything that a change must pass
	@bash .ci/run

clean:  ## remove the environment and the caches; trained models in runs/ stay
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second `make train` start at once; a changed pyproject.toml makes them old.
$(VENV)/.installed-%: pyproject.toml $(PYTHON)
	@echo "Installing $(PACKAGES_$*) into $(VENV): once, a minute or a few ..."
	@if [ -n "$(UV)" ]; \
	then "$(UV)" pip install --quiet --python $(PYTHON) --editable ".$(EXTRAS_$*)"; \
	else $(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".$(EXTRAS_$*)"; fi
	@touch $@

# A name on the PATH proves little (a version manager's shim can be there and fail), so each candidate is run.
$(PYTHON):
	@for python in python3.13 python3.12 python3.11 python3 python; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	    echo "Making $(VENV) with $$("$$python" --version) ..."; \
	    rm -rf $(VENV); \
	    if [ -n "$(UV)" ]; \
	    then "$(UV)" venv --quiet --seed --python "$$("$$python" -c 'import sys; print(sys.executable)')" $(VENV); \
	    else "$$python" -m venv $(VENV); fi && exit 0; \
	    rm -rf $(VENV); exit 1; \
	done; \
	echo "minimoe needs Python 3.11 or newer, and none was found: install one from https://www.python.org/downloads/ and try again." >&2; \
	exit 1
