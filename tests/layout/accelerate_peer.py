"""What one process of `accelerate launch` makes of our FSDP file; run by test_layout.py.

accelerate itself switches FSDP on for accelerators alone (state.py, AcceleratorState), so on a CPU its own plugin and its
own `fsdp2_prepare_model` are called with what the launcher handed to this process.
"""

from types import SimpleNamespace

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

state = PartialState(cpu=True)
plugin = FullyShardedDataParallelPlugin()
sizes = {"vocab_size": 257, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
plugin.cpu_ram_efficient_loading = False  # the model has its values already
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), device=state.device, is_main_process=state.is_main_process,
    torch_device_mesh=None, parallelism_config=None, mixed_precision="no",
)  # fmt: skip
model = fsdp2_prepare_model(accelerator, model)
ids = torch.randint(0, 257, (2, 16))
model(input_ids=ids, labels=ids).loss.backward()
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
print(f"SHARDED fsdp_version={plugin.fsdp_version} reshard={plugin.reshard_after_forward} DTensor", flush=True)
state.destroy_process_group()
