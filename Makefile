# One virtual environment for everything; `make help` lists the targets.
# PYTHON chooses the interpreter (3.11 or 3.12), CORES the cores of `make reproduce`.
# TORCH_ARGS is passed on when torch is installed, e.g. an index that has CPU builds.

SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
CORES ?= all
CONFIG ?= workflow/config/demo.yaml
TORCH_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
# The kernel drops this lock with its process, also after kill -9; Snakemake's own lock would stay and
# ask for --unlock.
RUN := flock --nonblock --conflict-exit-code 75 .venv/.running $(BIN)/snakemake --nolock \
	--cores $(CORES) --rerun-incomplete --show-failed-logs --configfile $(CONFIG)
REFUSED := { status=$$?; [ $$status != 75 ] || echo "another run of this folder is under way"; exit $$status; }
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help reproduce report test lint gate bench bench-check bench-baseline published verify clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(STAMP) ## Install, then run the whole demo: reports/demo/index.html
	@$(RUN) || $(REFUSED)

report: $(STAMP) ## Snakemake's own report of the last run: reports/snakemake.html
	$(BIN)/snakemake --configfile $(CONFIG) --report reports/snakemake.html

test: $(STAMP) ## Install, then run the tests
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) ## Style of Python and Snakemake files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

gate: $(STAMP) ## Every kernel provider against its reference, every kernel against its snapshot
	$(BIN)/ham kernels verify
	$(BIN)/ham kernels gate

bench: $(STAMP) ## Verify and time every kernel provider on this machine
	$(BIN)/ham kernels bench --rows results/kernels/bench.rows.jsonl

bench-check: $(STAMP) ## Has an operation become slower than the baseline of this device?
	$(BIN)/python -m pytest kernels/benchmarks

bench-baseline: $(STAMP) ## Store the speeds that the baseline of this device lacks; leave it alone meanwhile
	$(BIN)/python -m pytest kernels/benchmarks --store-baseline

published: $(STAMP) ## Make reports/published again from results/published
	$(BIN)/ham publish report

verify: $(STAMP) ## Are published tables and figures what their raw rows give, byte by byte?
	$(BIN)/ham verify --all

clean: ## Remove the environment and caches; results and reports stay
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment.yml: pyproject.toml ham/envfile.py ## Regenerate from pyproject.toml
	$(PYTHON) ham/envfile.py > $@

# torch first and exactly: a range, or a package that asks for torch, may pull a CUDA build of
# several GB. Those builds bring their own Triton; CPU builds bring none.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PIP) $(TORCH_ARGS) torch==2.13.0
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None or sys.platform != "linux")'; \
	then $(PIP) triton==3.6.0; fi
	@$(PIP) -e '.[test]'
	@touch $@
