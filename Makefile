# make run     the quickstart: out/quickstart.jsonl, out/summary.json, out/timeline.json
# make test    lint, then the whole test suite
# make setup   the virtual environment alone
# make lint    ruff and mypy;  make format rewrites what ruff can
#
# PYTHON chooses the interpreter of the virtual environment (3.10 to 3.12); ARGS goes to launch/run.py.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TINY := models/tiny
ARGS ?=

# The DeepSpeed launcher starts its ranks with the python and ninja it finds on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# DeepSpeed compiles no kernel while it is installed; this engine uses none of them.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup run test lint format bench

setup: $(STAMP)

# torch comes first because DeepSpeed's setup looks for it. The stamp is written last: an interrupted
# installation is taken up again by the next make.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt setuptools
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Threads that sleep rather than spin while they wait: on a busy machine the training is many times faster.
$(TINY): | $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python tools/make_tiny_model.py $@

run: $(STAMP) | $(TINY)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(VENV)/bin/deepspeed --num_accelerators 2 \
		launch/run.py --config configs/quickstart.yaml --overwrite $(ARGS)

# On GPUs, with the CUDA packages in the environment: make bench PYTHON=... BENCH='--layouts "P2->T2" T2 ...'
BENCH ?= --model-shape llama2-70b --workload arxiv:160 --layouts "P2->T2" T2 P2
bench:
	PYTHONPATH=$(CURDIR) $(PYTHON) tools/bench.py $(BENCH)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint
	$(VENV)/bin/python -m pytest -q
