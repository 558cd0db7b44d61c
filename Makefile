# `make help` lists the targets. Everything runs in .venv, made from pyproject.toml by plain pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
SEEDS ?= 0 1 2
# The teacher has all digits with true labels, the students 40 of each, half of them with random labels: room to gain
DIGITS := --data.name digits --data.image_size 16 --networks.teacher.name cifar_wrn_10_2 \
  --networks.student.name cifar_resnet8 --optimizer.lr 0.05 --schedule.name cosine --progress_bar false
TEACHER := $(DIGITS) --method vanilla --batch_size 64 --fit.epochs 8
STUDENT := $(DIGITS) --networks.teacher.weights $(OUT)/teacher --data.per_class 40 --data.noise 0.5 --batch_size 32 \
  --schedule.warmup 2 --fit.epochs 20 --fit.evaluate_every 26
METHODS := vanilla kd kd+adm uniform
uniform := kd+adm --adm.control uniform
RUNS := $(foreach seed,$(SEEDS),$(foreach method,$(METHODS),$(OUT)/$(method)-$(seed)))
# One thread each, two at a time; what a run says is in its log.txt
RUN = @said=$$(OMP_NUM_THREADS=1 $(BIN)/python $(1) --out $@ 2>&1) \
  && echo "$(notdir $@): $${said\#\#*$$'\n'}" || { echo "$$said"; exit 1; }
STAMP := $(VENV)/.installed

.PHONY: help env quickstart test lint test-slow test-gpu bench clean $(OUT)/teacher $(RUNS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## the environment: .venv with the [dev] extra, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

quickstart: env  ## a student alone, with KD, KD+ADM and its control on real handwritten digits; a table and two figures
	@$(MAKE) --no-print-directory -j 2 $(RUNS)
	@$(BIN)/python offline_kd/tools/visualize.py $(OUT)/kd+adm-0 --images 2 > /dev/null
	@echo
	@$(BIN)/python tools/compare.py $(RUNS) --baseline kd --brief --out $(OUT)
	@echo "Where teacher and student agree and differ: $(OUT)/kd+adm-0/figures/maps.png"

$(OUT)/teacher:
	$(call RUN,classification/tools/train.py $(TEACHER))

$(RUNS): $(OUT)/%: $(OUT)/teacher
	$(call RUN,offline_kd/tools/train.py $(STUDENT) --seed $(lastword $(subst -, ,$*)) \
	  --method $(or $($(firstword $(subst -, ,$*))),$(firstword $(subst -, ,$*))))

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
