# Every target makes what it needs on a fresh machine: Python 3.11 or newer and make are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CHECK  := $(VENV)/.ready-check
RANKS  ?= 2
export HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test check bench bench-peers sweep faults oracle gpu-wheels clean

# The main job on the built-in sample: ZeRO-3 with CPU offload on two ranks, on GPUs where there are some.
demo: $(READY)
	rm -rf runs/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" LOCAL_SIZE=$(RANKS) $(BIN)/deepspeed launch/train.py zero=stage3 offload=cpu run.dir=runs/demo run.epochs=15
	$(BIN)/python launch/ask.py run=runs/demo "What is the capital of France?"

# Files side by side, two at a time: the tests of two ranks wait for each other half of the time.
test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(CHECK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Every ratio of docs/performance.md that needs no card, in about an hour of two idle cores.
bench: $(READY) bench-peers
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/preparation.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scaling.py
	mkdir -p build
	$(BIN)/python benchmarks/nvme.py build > benchmarks/results/nvme.md

# TRL and transformers have an environment of their own; these four need ../shared.
PEERS := build/peers/bin/python
bench-peers: $(READY)
	test -x $(PEERS) || $(PYTHON) -m venv build/peers
	$(PEERS) -m pip install -q -c benchmarks/peers/constraints.txt torch
	$(PEERS) -m pip install -q -c benchmarks/peers/constraints.txt trl transformers accelerate datasets
	for what in padded packed start data; do $(BIN)/python benchmarks/peers.py $$what --python $(PEERS) --json || exit 1; done

# The sweeps that are too long for every change.
sweep: $(READY)
	$(BIN)/python -m pytest -q -m slow

# Kills, damages, resumes and moves, all of them: about an hour on two cores.
FAULTS := PYTHONPATH=.:tests OMP_NUM_THREADS=1
faults: $(READY)
	mkdir -p build
	gcc -O1 -Wall -shared -fPIC -o build/boundary.so tests/faults/boundary.c -ldl
	$(FAULTS) LD_PRELOAD=$(CURDIR)/build/boundary.so $(BIN)/python tests/faults/kills.py --random 200 --json benchmarks/results/faults-kills.json
	$(FAULTS) LD_PRELOAD=$(CURDIR)/build/boundary.so $(BIN)/python tests/faults/lives.py --json benchmarks/results/faults-lives.json
	$(FAULTS) LD_PRELOAD=$(CURDIR)/build/boundary.so $(BIN)/python tests/faults/disks.py --runs --json benchmarks/results/faults-disks.json
	$(FAULTS) $(BIN)/python tests/faults/compositions.py --cases 5000 --processes 2 --json benchmarks/results/faults-compositions.json
	$(FAULTS) $(BIN)/python tests/faults/pairs.py --json benchmarks/results/faults-pairs.json
	$(FAULTS) $(BIN)/python tests/faults/hangs.py --seconds 12 --launchers --json benchmarks/results/faults-hangs.json
	$(FAULTS) $(BIN)/python tests/faults/damage.py --cases 1000 --json benchmarks/results/faults-damage.json
	$(FAULTS) $(BIN)/python tests/faults/resumes.py --ranks 2 --json benchmarks/results/faults-resumes.json zero=stage2 tuning=lora tuning.dropout=0.1
	$(FAULTS) $(BIN)/python tests/faults/spikes.py --json benchmarks/results/faults-spikes.json
	$(FAULTS) $(BIN)/python tests/faults/frugal.py --json benchmarks/results/faults-frugal.json
	$(FAULTS) $(BIN)/python tests/faults/moves.py --chains 60 --json benchmarks/results/faults-moves.json

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

# Ask the real allocator library again; WHEELS is the folder of CUDA wheels that the script's docstring names.
WHEELS ?= build/cuda-wheels
oracle: $(READY)
	$(BIN)/python benchmarks/memory/oracle.py $(WHEELS)

# What a bare GPU image lacks (benchmarks/gpu/bare.sh installs it there): DeepSpeed without ops, and small pure packages.
GPU_PYTHON ?= 3.12
gpu-wheels: $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel -q --no-deps -c constraints.txt -w build/gpu-wheels deepspeed hydra-core omegaconf 'antlr4-python3-runtime==4.9.*'
	$(BIN)/python -m pip download -q --no-deps -c constraints.txt -d build/gpu-wheels --only-binary=:all: --python-version $(GPU_PYTHON) \
		--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --platform any \
		einops hjson py-cpuinfo msgpack ninja pydantic pydantic-core==$$($(BIN)/python -c 'import pydantic_core; print(pydantic_core.__version__)') \
		annotated-types typing-inspection nvidia-ml-py psutil rich markdown-it-py mdurl pygments datasets dill multiprocess
	$(BIN)/python benchmarks/gpu/one_cuda.py bitsandbytes==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("bitsandbytes"))') build/gpu-wheels
	du -sh build/gpu-wheels

clean:
	rm -rf $(VENV) runs
