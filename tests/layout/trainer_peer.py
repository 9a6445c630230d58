"""Two steps of transformers' Trainer under the DeepSpeed JSON in the folder given; run by test_layout.py."""

import sys
from pathlib import Path

sys.modules.pop("orchestrator", None)

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # ten seconds of compiling that training never uses
folder = Path(sys.argv[1])
sizes = {"vocab_size": 257, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
rows = [{"input_ids": torch.randint(0, 257, (16,)), "labels": torch.randint(0, 257, (16,))} for _ in range(16)]
arguments = TrainingArguments(
    str(folder / "out"), per_device_train_batch_size=8, max_steps=2, deepspeed=str(folder / "ds.json"), report_to=[],
    learning_rate=1e-3, use_cpu=True, save_strategy="no", max_grad_norm=0.5,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=rows)
result = trainer.train()
print("TRAINED", result.global_step, type(trainer.model_wrapped.optimizer).__name__)
