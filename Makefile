# Every command that this project needs; `make` alone lists them. Nothing has to be installed by hand.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install reproduce real latency accuracy report compare test soak lint notebooks check-results stamp clean

PYTHON ?= python3
VENV := .venv
IN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= results/runs
# With a CUDA device real shapes, without one the tiny backbone; PROFILE=cpu, gpu or paper chooses by hand.
PROFILE ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo gpu || echo cpu)
# What reproduce runs: a suite of conf/suites.yaml, or EXPERIMENTS="table1 table5"
SUITE ?= paper
EXPERIMENTS ?=
# More overrides for every experiment, for example OVERRIDES="seed=0,1,2"
OVERRIDES ?=
# Two cores take 16 minutes for table2's five seeds, two jobs at a time: there `make reproduce` shows that everything works, with one seed
SEEDS := $(if $(filter cpu,$(PROFILE)),seed=0)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv and install everything there (2 minutes, 3 GB)

$(STAMP): pyproject.toml constraints.txt
	@echo "install: about 2 minutes, 3 GB on disk"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": set PYTHON=")'
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment: install its venv module"; exit 1; }
	@$(IN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" --constraint constraints.txt
	@touch $@

# A failing experiment does not keep the others, or the report, from running; the exit status tells.
reproduce: $(STAMP) ## Run the main experiments and draw the report; call it again to go on (cpu: 12 to 17 minutes)
	@echo "reproduce: profile $(PROFILE), records in $(RUNS); interrupt it at any time, the same command goes on"
	@experiments="$(EXPERIMENTS)"; status=0; \
	[ -n "$$experiments" ] || experiments=$$($(IN)/python scripts/suite.py $(SUITE) $(PROFILE)) || exit 2; \
	for experiment in $$experiments; do \
	  echo; echo "== $$experiment: $$(grep -D skip -oE 'profile=$(PROFILE): [^.]*|Any profile: [^.]*' conf/experiment/$$experiment.yaml | head -n 1)"; \
	  $(IN)/python scripts/run.py experiment=$$experiment profile=$(PROFILE) runs_dir=$(RUNS) \
	    $$([ $$experiment = table2 ] && echo $(SEEDS)) $(OVERRIDES); \
	  case $$? in 0) ;; 130|143) exit 130 ;; *) status=1 ;; esac; \
	done; \
	$(MAKE) --no-print-directory report RUNS=$(RUNS) || status=1; \
	exit $$status

real: $(STAMP) ## A real pre-trained model on real tasks: fetched, trained, evaluated, timed (cpu: 15 minutes)
	@$(IN)/python scripts/prepare.py smollm2
	@$(IN)/python scripts/run.py experiment=real profile=real runs_dir=$(RUNS) $(OVERRIDES)

latency: ## The experiments on latency and memory alone, and the report (one GPU: see docs/running.md)
	@$(MAKE) --no-print-directory reproduce SUITE=latency

accuracy: ## The whole study of accuracy, five seeds everywhere, and the report (one GPU: see docs/running.md)
	@$(MAKE) --no-print-directory reproduce SUITE=accuracy SEEDS=

report: $(STAMP) ## Draw page, tables, figures and verdicts from the records (10 seconds)
	@echo; echo "== report: about 10 seconds"
	@$(IN)/python scripts/report.py --records $(RUNS)/records --out $(RUNS)/report

compare: $(STAMP) ## Put your own run beside the published one: what is the same, what differs, what is missing
	@$(IN)/python scripts/report.py --records $(RUNS)/records --compare results/measurements.csv.gz --out $(RUNS)/report

test: $(STAMP) ## Run all tests that need no GPU, and the notebooks (10 minutes)
	@echo "test: about 10 minutes"
	@$(IN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbmake tests notebooks

soak: $(STAMP) ## Let every reader have 100,000 damaged files, kill runs 100 times, fuzz by coverage; called again, it goes on with the next kind (an hour)
	@ADAFUSE_SOAK=$${ADAFUSE_SOAK:-100000} $(IN)/python -m pytest -q -p no:cacheprovider tests/fuzz tests/crash
	@$(IN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt atheris
	@$(IN)/python tests/fuzz/guided.py

lint: $(STAMP) ## Check style, types and who imports whom (1 minute the first time)
	@$(IN)/ruff check .
	@$(IN)/ruff format --check .
	@$(IN)/mypy
	@$(IN)/lint-imports --no-cache --no-logo

notebooks: $(STAMP) ## Run the notebooks and keep their output in place (1 minute)
	@$(IN)/jupyter execute --inplace notebooks/*.ipynb

check-results: $(STAMP) ## Redraw results/, docs/results.md and README.md's block from the records and compare (10 seconds)
	@$(IN)/python scripts/report.py --records results/reference --out results --readme README.md --check

stamp: $(STAMP) ## Note the commit among the files, for a copy of them on a machine without the clone
	@$(IN)/python -m adafuse.machine

clean: ## Remove the virtual environment and all caches; records stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
