"""From a command line to a job of a scheduler: compose, plan, save the spec, render, submit."""

from orchestrator.jobs.planned import Planned, plan_all
from orchestrator.jobs.slurm import Submitted, batches, submit

__all__ = ["Planned", "Submitted", "batches", "plan_all", "submit"]
