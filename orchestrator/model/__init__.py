"""From a spec to a module and its initial values."""

from orchestrator.model.build import architecture, build, table_of
from orchestrator.model.head import learning
from orchestrator.model.loss import loss_sum, target_of
from orchestrator.model.weights import open_weights

__all__ = ["architecture", "build", "learning", "loss_sum", "open_weights", "table_of", "target_of"]
