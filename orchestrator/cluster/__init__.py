"""The machines: the table of cards with their sources, and the machine at hand."""

from orchestrator.cluster.hardware import card_of
from orchestrator.cluster.local import local_cluster

__all__ = ["card_of", "local_cluster"]
