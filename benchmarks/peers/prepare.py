"""Tokenise and pack one file of texts, by TRL's SFTTrainer or by this project; prints what it took as one JSON object.

    python prepare.py "trl as it comes"|"trl keeping all"|ours FILE TOKENIZER LENGTH PROCESSES CACHE

TRL: `load_dataset` and what SFTTrainer does when it is made with packing=True and dataset_num_proc; "keeping all" with
packing_strategy="bfd_split", which puts what is left of a long text into further rows. Ours: `data.prepare` and the rows of an
epoch. Imports are not counted, processes that were started are.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def spent() -> float:
    """Seconds of the processor of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def trl(path: str, tokenizer: str, length: int, processes: int, cache: str, packing: str = "bfd") -> tuple[Any, Any]:
    """(what is timed, what counts afterwards)."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = AutoTokenizer.from_pretrained(tokenizer)
    small = LlamaConfig(vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(small)
    config = SFTConfig(
        cache, use_cpu=True, bf16=False, max_length=length, packing=True, packing_strategy=packing, report_to="none",
        dataset_num_proc=processes,
    )  # fmt: skip

    def work() -> Any:
        data = load_dataset("json", data_files=path, split="train", cache_dir=cache)
        return SFTTrainer(model, config, train_dataset=data, processing_class=words).train_dataset

    def count(packed: Any) -> tuple[int, int]:
        return sum(map(len, packed["input_ids"])), len(packed)

    return work, count


def ours(path: str, tokenizer: str, length: int, processes: int, cache: str) -> tuple[Any, Any]:
    """The same of this project."""
    import pyarrow.ipc  # noqa: F401

    from orchestrator.data import load_tokenizer, prepare, rows_of
    from orchestrator.spec import Data

    data = Data(path, length, tokenizer=tokenizer, packing="best_fit", workers=processes, format="text")
    words = load_tokenizer(data, None)

    def work() -> Any:
        return rows_of(prepare(data, words, 0, Path(cache)))

    return work, lambda rows: (int(rows.lengths.sum()), len(rows))


def main(kind: str, path: str, tokenizer: str, length: str, processes: str, cache: str) -> None:
    kinds = {"ours": ours, "trl as it comes": trl, "trl keeping all": partial(trl, packing="bfd_split")}
    work, count = kinds[kind](path, tokenizer, int(length), int(processes), cache)
    began, used = time.perf_counter(), spent()
    made = work()
    wall, cpu = time.perf_counter() - began, spent() - used
    tokens, rows = count(made)
    print(json.dumps({"cpu": cpu, "wall": wall, "tokens": tokens, "rows": rows, "fill": tokens / (rows * int(length))}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
