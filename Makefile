# `make help` lists the targets. Everything runs in .venv, made from pyproject.toml by plain pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
SEEDS ?= 0 1 2
METHODS := vanilla dml dml+adm
# 40 of each digit and 15 short epochs: nine runs fit five minutes on two cores
QUICK := --config classification/recipes/digits.yaml --data.per_class 40 --batch_size 32 --fit.epochs 15 \
  --schedule.milestones [10,13]
STAMP := $(VENV)/.installed

.PHONY: help env quickstart test lint test-slow test-gpu bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## the environment: .venv with the [dev] extra, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

quickstart: env  ## vanilla, DML and DML+ADM on real handwritten digits, 3 seeds each; a table and two figures
	@set -e; for seed in $(SEEDS); do for method in $(METHODS); do \
	  echo "== $$method, seed $$seed"; \
	  $(BIN)/python classification/tools/train.py $(QUICK) --method $$method --seed $$seed \
	    --out $(OUT)/$$method-$$seed; \
	done; done
	@$(BIN)/python classification/tools/visualize.py $(OUT)/dml+adm-0
	@$(BIN)/python tools/compare.py $(foreach s,$(SEEDS),$(foreach m,$(METHODS),$(OUT)/$(m)-$(s))) --baseline dml --out $(OUT)

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
