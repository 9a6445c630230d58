"""From the command line to a RunSpec: the only room that knows Hydra."""

from orchestrator.config.compose import build_cluster, compose
from orchestrator.config.entry import run_app
from orchestrator.config.jobs import compose_job
from orchestrator.config.strategy import require_strategy

__all__ = ["build_cluster", "compose", "compose_job", "require_strategy", "run_app"]
