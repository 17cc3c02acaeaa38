# Every target sets the environment up first; it is a no-op when nothing has changed.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
RUN := PATH="$(VENV)/bin:$$PATH" DS_ACCELERATOR=cpu

.PHONY: help venv demo test check docs picture bench gpu-check clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

venv: ## make .venv with everything pinned
	@$(PYTHON) cluster/setup.py

demo: venv ## train a small Hope from an embedded S3 on a local Ray cluster, kill a worker, resume
	@$(RUN) python jobs/demo.py $(DEMO)

test: venv ## every test, on two workers
	@$(RUN) python -m pytest -n 2 --no-loadscope-reorder $(PYTEST)

check: venv ## lint, format, types
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

docs: ## the site with the reference, strict, in runs/site; installs the extra `docs` the first time
	@$(PYTHON) cluster/setup.py --extra docs
	@$(RUN) PYTHONPATH="$(CURDIR)" NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
	@echo "runs/site/index.html"

picture: ## draw docs/architecture.svg from the imports; needs nothing but Python
	@$(PYTHON) -m tools.picture

bench: venv ## every benchmark in its quick form
	@$(RUN) python -m benchmarks --quick

gpu-check: ## kernels, model and job on this machine's GPU; its first part needs CUDA, torch, triton and pytest only
	@$(PYTHON) -m benchmarks.gpu_check

clean: ## remove the environment and all runs
	rm -rf .venv runs
