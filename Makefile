# `make help` lists the targets. Everything runs in .venv, made from pyproject.toml by plain pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
SEEDS ?= 0 1 2 3
# 40 of each digit, half of them with random labels: room below the ceiling. Two runs at a time fit five minutes on two cores
QUICK := --config classification/recipes/digits.yaml --data.per_class 40 --data.noise 0.5 --batch_size 32 \
  --optimizer.lr 0.05 --schedule.name cosine --schedule.warmup 2 --fit.epochs 20 --fit.evaluate_every 26
METHODS := vanilla dml dml+adm uniform
uniform := dml+adm --adm.control uniform
RUNS := $(foreach seed,$(SEEDS),$(foreach method,$(METHODS),$(OUT)/$(method)-$(seed)))
STAMP := $(VENV)/.installed

.PHONY: help env quickstart test lint test-slow test-gpu bench clean $(RUNS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## the environment: .venv with the [dev] extra, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

quickstart: env  ## training alone, DML, DML+ADM and its control on real handwritten digits; a table and two figures
	@$(MAKE) --no-print-directory -j 2 $(RUNS)
	@$(BIN)/python classification/tools/visualize.py $(OUT)/dml+adm-0 --images 2 > /dev/null
	@echo
	@$(BIN)/python tools/compare.py $(RUNS) --baseline dml --brief --out $(OUT)
	@echo "Where teacher and student agree and differ: $(OUT)/dml+adm-0/figures/maps.png"

$(RUNS): $(OUT)/%:  # its lines are in log.txt: two runs at a time would mix theirs
	@said=$$(OMP_NUM_THREADS=1 $(BIN)/python classification/tools/train.py $(QUICK) --seed $(lastword $(subst -, ,$*)) --out $@ \
	  --method $(or $($(firstword $(subst -, ,$*))),$(firstword $(subst -, ,$*))) --progress_bar false 2>&1) \
	  && echo "$*: $${said##*epoch}" || { echo "$$said"; exit 1; }

lint: env  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: env  ## ruff and the fast tests
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 15

test-slow: env  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow -q --durations 15

test-gpu: env  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -q

bench: env  ## speed and memory as ratios to the bare computation
	$(BIN)/python tools/benchmark/run.py --out runs/benchmark

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
