# Every target makes what it needs on a fresh machine: Python 3.11 or newer and make are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CHECK  := $(VENV)/.ready-check
RANKS  ?= 2
export HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test check bench sweep clean

# The main job on the built-in sample: ZeRO-3 with CPU offload on two ranks, on GPUs where there are some.
demo: $(READY)
	rm -rf runs/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" LOCAL_SIZE=$(RANKS) $(BIN)/deepspeed launch/train.py zero=stage3 offload=cpu run.dir=runs/demo run.epochs=12
	$(BIN)/python launch/ask.py run=runs/demo "What is the capital of France?"

test: $(READY)
	$(BIN)/python -m pytest -q

check: $(CHECK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(READY)
	$(BIN)/python benchmarks/loading.py

# The sweeps that are too long for every change.
sweep: $(READY)
	$(BIN)/python -m pytest -q -m slow

# torch goes first and alone, so that nothing that follows can choose another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/python -c 'import torch, deepspeed; print("torch", torch.__version__, "deepspeed", deepspeed.__version__)' 2>/dev/null
	touch $@

$(CHECK): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[check]'
	touch $@

clean:
	rm -rf $(VENV) runs
