"""Which ranks compute one model together, and which hold copies of it, in the words that DeepSpeed asks for them in."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA, TENSOR = "dp", "tp"


class Groups:
    """A rank's place among `tp` ranks that divide each matrix and among the ranks with the same part of it: Megatron's "model
    parallel unit", as runtime/config.py, runtime/engine.py, utils/groups.py and utils/bwc.py of DeepSpeed 0.19.8 use it."""

    def __init__(self, device: torch.device, tp: int) -> None:
        shape = (dist.get_world_size() // tp, tp)
        self.mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh[DATA].get_group()

    def get_data_parallel_rank(self) -> int:
        return self.mesh[DATA].get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        return self.mesh[DATA].size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh[TENSOR].get_group()

    def get_model_parallel_rank(self) -> int:
        return self.mesh[TENSOR].get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        return self.mesh[TENSOR].size()


def forget() -> None:
    """Let the next engine of this process have groups of its own: DeepSpeed keeps the last ones that it was given."""
    kept: Any = sys.modules["deepspeed.utils.groups"]
    kept.mpu = None
