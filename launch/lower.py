"""Print what a strategy is lowered to: the DeepSpeed JSON as accelerate and transformers' Trainer take it, or accelerate's
FSDP config. `python launch/lower.py zero=stage3 offload=cpu > ds.json`; JSON alone goes to stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import compose, run_app
from orchestrator.errors import ConfigError, Fault


def lower(overrides: list[str]) -> int:
    """Print the lowered strategy for the ranks of `cluster`, or of this machine; the exit code."""
    from orchestrator import layout
    from orchestrator.cluster.local import local_cluster
    from orchestrator.spec import Engine

    spec = compose(overrides, local=local_cluster)
    fsdp = spec.strategy.engine is Engine.FSDP
    if spec.strategy.tp > 1:
        problem = f"tensor={spec.strategy.tp}: accelerate's file has no word for it that divides a model as it is divided here"
        raise ConfigError(Fault("tensor", problem, "lower it without tensor, or train with launch/train.py"))
    print(json.dumps(layout.accelerate_config(spec) if fsdp else layout.lower(spec), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lower, program="launch/lower.py"))
