"""Orchestrator: DeepSpeed and FSDP2 fine-tuning that knows what every card will hold before anything is launched."""

__version__ = "0.1.0"
