"""One rank of TRL's SFTTrainer or transformers' Trainer on rows of prompt and completion, over gloo (torchrun, two ranks).

Without packing the rows are taken in the order of the file, which is the order in which our run draws them: a step has the
same samples. Packed rows come in the trainer's own random order: TRL packs the longest samples into the first rows.

    torchrun --nproc-per-node=2 theirs.py '{"kind": "trl" or "hf", "rows": FILE, "shape": {…}, …}'

With "turns" in the options it takes its steps in turns with other jobs (turns.py); else it leaves the file OUT/first when the
first is done.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def arguments_of(options: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are told: the same batch, rate and length, nothing saved and nothing reported."""
    return {
        "output_dir": options["out"], "use_cpu": True, "per_device_train_batch_size": options["micro"],
        "gradient_accumulation_steps": options["accumulation"], "max_steps": options["steps"], "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "seed": 0,
        "bf16": False, **options.get("arguments", {}),
    }  # fmt: skip


def tokenised(rows: list[dict[str, str]], tokenizer: Any, length: int) -> Any:
    """Rows for transformers' Trainer: what its examples write by hand."""
    from datasets import Dataset

    def one(row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = (prompt + answer)[:length]
        return {"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:length], "attention_mask": [1] * len(ids)}

    return Dataset.from_list(rows).map(one, remove_columns=["prompt", "completion"])


def main(options: dict[str, Any]) -> None:
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    model = LlamaForCausalLM(LlamaConfig(**options["shape"]))
    rows = [json.loads(line) for line in Path(options["rows"]).read_text(encoding="utf-8").splitlines()]
    counted = dict.fromkeys(("labels", "tokens", "positions"), 0)

    def counting(base: type) -> type:
        class Counting(base):
            def _get_train_sampler(self, *unused: Any) -> Any:
                if options.get("packing"):
                    return super()._get_train_sampler(*unused)
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def training_step(self, model: Any, inputs: Any, *further: Any, **named: Any) -> Any:
                positions = inputs["input_ids"].numel()
                mask = inputs.get("attention_mask")  # none where rows are joined without padding
                counted["labels"] += int((inputs["labels"][:, 1:] != -100).sum())
                counted["tokens"] += positions if mask is None else int(mask.sum())
                counted["positions"] += positions
                return super().training_step(model, inputs, *further, **named)

        return Counting

    callbacks = []
    if "turns" in options:
        from turns import Turns

        turns = Turns(Path(options["turns"]), options["name"], options["steps"])

        class Borders(TrainerCallback):
            def on_train_begin(self, *unused: Any, **named: Any) -> None:
                turns.begin()

            def on_step_end(self, *unused: Any, **named: Any) -> None:
                turns.border(**counted)
                counted.update(dict.fromkeys(counted, 0))

        callbacks.append(Borders())
    else:

        class FirstStep(TrainerCallback):
            def on_step_end(self, *unused: Any, **named: Any) -> None:
                (Path(options["out"]) / "first").write_text("done")

        callbacks.append(FirstStep())
    if options["kind"] == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        chosen = SFTConfig(**arguments_of(options), max_length=options["length"], packing=options.get("packing", False))
        data = Dataset.from_list(rows)
        trainer = counting(SFTTrainer)(model, chosen, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)
    else:
        data = tokenised(rows, tokenizer, options["length"])
        trainer = counting(Trainer)(
            model, TrainingArguments(**arguments_of(options)), train_dataset=data, callbacks=callbacks,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )  # fmt: skip
    trainer.train()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
