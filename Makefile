# Every target creates .venv and installs the pinned requirements when they are missing or changed.
# pip's own settings are honoured (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...): point them at a
# CPU-only wheel of torch 2.13.0 to save the CUDA libraries on a machine without a GPU.

SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c requirements/constraints.txt
# Full progress in a terminal, the errors alone in a log.
PIP += $(shell test -t 2 || echo --quiet)
PYTHON ?= python3.11 python3.12 python3.13 python3
NEEDS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
# Options for the command behind a target: make demo ARGS="--seed 5", make test ARGS="-k masks"
ARGS ?=

.PHONY: help demo test lab space lint browser

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/.core ## run every stage in miniature on built-in data, end in runs/demo/report.html
	@$(BIN)/rorem run demo $(ARGS)
	@echo "Report: $(CURDIR)/runs/demo/report.html"

# A quick look: make test ARGS="-m 'not slow'". The tests of the benchmarks: ARGS="-m benchmark".
# Where one of the two processes crashes the run ends: a new one would wait for the lost tests.
test: .venv/.dev browser ## run the tests (those of the benchmarks with ARGS="-m benchmark")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/benchmarks \
		-n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
		--durations=25 -m "not benchmark" $(ARGS)

lab: .venv/.core ## open JupyterLab on the notebooks
	@if [ "$$(id -u)" = 0 ]; then \
		echo "You are root: JupyterLab is started with --allow-root, and whoever has its address" \
			"with the token is root too."; \
	fi
	@JUPYTER_CONFIG_PATH="$(CURDIR)$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_remove_objects.ipynb \
		$$([ "$$(id -u)" != 0 ] || echo --allow-root) $(ARGS)

space: .venv/.core ## write space/, the app of `rorem app` ready to push to the Hugging Face Hub
	@$(BIN)/python -m rorem_lib.app.space $(ARGS)

lint: .venv/.dev ## check code and format with ruff, and that notebooks carry no outputs
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -exec $(BIN)/nbstripout \
		--verify --extra-keys "metadata.papermill cell.metadata.papermill" {} +

# The stamp of a set of requirements is the last thing written: whatever stops an install before it,
# the next make installs again. .venv is made anew when it was copied or moved here, when its Python
# is gone, or when an install was killed half-way (.installing is still there).
ifneq ($(shell [ ! -e .venv/.installing ] && $(BIN)/python -c '' 2>/dev/null && cat .venv/.place 2>/dev/null),$(CURDIR))
.PHONY: .venv/.core
endif

.venv/.core: requirements/core.txt requirements/constraints.txt pyproject.toml
	@set -e; \
	other=$$(cat .venv/.installing 2>/dev/null || true); \
	if [ -n "$$other" ] && kill -0 "$$other" 2>/dev/null; then \
		echo "Process $$other is installing into .venv: wait for it, then try again." >&2; \
		exit 1; \
	fi; \
	if [ -e .venv/.installing ] || ! $(BIN)/python -c '' 2>/dev/null \
			|| [ "$$(cat .venv/.place 2>/dev/null)" != '$(CURDIR)' ]; then \
		for python in $(PYTHON); do \
			if $$python -c '$(NEEDS)' >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "No Python 3.11 or newer with its venv module among: $(PYTHON)." \
				"Install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
				"or name it: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		rm -rf .venv; mkdir .venv; echo $$$$ > .venv/.installing; \
		$$found -m venv .venv; \
		echo '$(CURDIR)' > .venv/.place; \
	fi
	@echo "Installing requirements/core.txt into .venv (2.5 GB, a minute or two) ..."
	@$(call install,-r requirements/core.txt -e .)
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification":' \
		'{"fetchNews": "false", "checkForUpdates": false}}' \
		> .venv/share/jupyter/lab/settings/overrides.json
	@touch $@

.venv/.dev: .venv/.core requirements/dev.txt
	@echo "Installing requirements/dev.txt into .venv ..."
	@$(call install,-r requirements/dev.txt)
	@touch $@

# A failed pip puts things back itself; only a killed one leaves .installing (its shell's id) behind.
install = echo $$$$ > .venv/.installing; $(PIP) $(1); status=$$?; rm -f .venv/.installing; exit $$status

# The widget is tested in a headless Chromium.
browser:
	@for name in chromium chromium-browser google-chrome; do \
		if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "No Chromium, and you are root: apt-get installs chromium and fonts-dejavu-core on" \
			"this machine, for the browser tests ..."; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends \
			chromium fonts-dejavu-core >/dev/null && exit 0; \
	fi; \
	echo "Warning: no Chromium was found or installed: the browser tests will not run." >&2
