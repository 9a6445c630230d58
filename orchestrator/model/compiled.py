"""Blocks compiled by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from orchestrator.spec import ROOT, RunSpec, block_of


def compile_blocks(model: nn.Module, spec: RunSpec) -> None:
    """Let each block of `model` compile its forward when it is first used, where the spec says so.

    It is the forward that is compiled, not the module: recompute around it, and the hooks with which FSDP2 gathers a block
    before it and lets go behind it, stay outside what is compiled. Names and classes of modules stay as they are. Adapters
    must be in the module before.
    """
    if spec.compile == "none":
        return
    for name, module in model.named_modules():
        if block_of(f"{name}.") != ROOT and block_of(f"{name.rpartition('.')[0]}.") == ROOT:
            block: Any = module
            block.forward = torch.compile(block.forward)
