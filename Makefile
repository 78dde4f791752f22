# castpoint. `make bench` and `make test` set up what they need.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
TORCH   := torch==2.13.0
RESULTS ?=
ARGS    ?=
WHERE   := $(if $(RESULTS),--results $(RESULTS))

.DEFAULT_GOAL := help
.PHONY: help bench test test-real compare study models gpu report publish lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18
	@echo "  RESULTS=folder: where records go or come from (default: runs/<machine>, which git ignores); ARGS=...: options of castpoint"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

bench: $(READY)  ## errors, amplification, error budget and speed of every plan on Qwen3-0.6B, plots and report
	$(BIN)/castpoint bench $(WHERE) $(ARGS)

test: $(READY)  ## prove that every kernel does what its plan says
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal $(ARGS)

compare: $(READY)  ## time the plans with pytest-benchmark and compare with the last saved run
	TRITON_INTERPRET=0 $(BIN)/pytest tests/bench -q -o addopts="" --benchmark-autosave --benchmark-storage=.benchmarks \
	  --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name \
	  $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare --benchmark-compare-fail=min:25%) $(ARGS)

study: models  ## fingerprints of public implementations, cases, gates, massive tokens, audit, systems rebuilt, their claims
	$(BIN)/python -m pip install -q -e '.[studies]'
	$(BIN)/castpoint study survey $(WHERE)
	$(BIN)/castpoint study cases $(WHERE)
	$(BIN)/castpoint study gates $(WHERE)
	$(BIN)/castpoint study streams $(WHERE)
	$(BIN)/castpoint audit $(WHERE)
	$(BIN)/castpoint audit --run $(WHERE)
	$(BIN)/castpoint audit --configs $(WHERE)
	$(BIN)/castpoint study systems $(WHERE)
	$(BIN)/castpoint study claims $(WHERE)

models: $(READY)  ## fetch Gemma 3 270M and Qwen2.5-Coder 0.5B, real models, into models/ (740 MB)
	$(BIN)/castpoint model gemma-3-270m --fetch-only
	$(BIN)/castpoint model qwen2.5-coder-0.5b-instruct --fetch-only

test-real: models  ## check that a model with a variant attached says what it should, on Gemma 3 270M
	$(BIN)/pytest -q tests/real -o addopts="" -n auto --maxprocesses 2 --dist loadfile $(ARGS)

gpu:  ## all that wants a CUDA device, with $(PYTHON) as it is: nothing is set up; ARGS='--minutes 9', and it goes on
	$(PYTHON) -m castpoint gpu $(WHERE) $(ARGS)

report: $(READY)  ## plots and report.md from the newest finished run
	$(BIN)/castpoint report $(WHERE)

publish: $(READY)  ## maintainers: a run of committed code (RESULTS=runs/cpu or run.tar.gz) into results/, with plots, report, README
	$(BIN)/castpoint publish $(RESULTS)

lint: $(READY)  ## check style, the import rule and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint && cp -Rp castpoint build/lint && cp -Rp kernels variants harness build/lint/castpoint
	cd build/lint && $(abspath $(BIN))/lint-imports --no-cache ../../pyproject.toml
	$(BIN)/mypy

format: $(READY)  ## rewrite to style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches; records stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
