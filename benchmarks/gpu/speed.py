"""How fast a step is on one real card: ours, transformers' Trainer in the same run, and what each lever gives by itself.

    python benchmarks/gpu/speed.py measure --out FOLDER [--minutes 9] [--only TEXT]      # on the machine with the card
    python benchmarks/gpu/speed.py summary FOLDER [--json FILE]                          # anywhere
    python benchmarks/gpu/speed.py measure --smoke --out FOLDER                          # on a CPU, in miniature

Needs what memory.py needs (bare.sh); QLoRA needs bitsandbytes besides, Liger liger-kernel, real data pyarrow: where one is
missing, that measurement says so and the others go on. Each is a process of its own, forked from one that has the libraries
loaded, and writes one JSON; the ones that say most come first, and none starts that could not end within the minutes.
Weights are random and tokens are random, or the project's own sample. Predicted seconds are the planner's, for the card named
by --card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a card must not start CUDA before the fork

import yaml  # noqa: E402
from cases import CONF, FULL, LORA, case, shape  # noqa: E402
from memory import about, in_child  # noqa: E402

from orchestrator import spec as s  # noqa: E402
from orchestrator.units import GIB, MIB  # noqa: E402

ANCHOR = 12_473.0
"""Tokens a second of Llama 3.1 8B with LoRA of rank 16 at 4,096 tokens, micro-batch 2, bf16, on one H100: NVIDIA NeMo
AutoModel's performance summary. `ANCHORED` is held against it."""

ANCHORED = "8b-lora"
WARM_STEPS, STEPS, SECONDS = 3, 10, 12.0
"""Steps left out; steps measured at most, and for how long at most."""

START_SECONDS = {"llama3_8b": 45.0, "llama32_1b": 25.0}
"""What a measurement of a model may take: none starts with less left of the minutes."""

QLORA = replace(LORA, kind="qlora", quant="nf4", double_quant=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. `by` "ours" or "trainer" (transformers' Trainer, with peft for adapters); `lever` names what differs
    from the case `against`; `data` "random" tokens, or the sample "padded" or "packed"."""

    name: str
    model: str
    tuning: s.Tuning = FULL
    length: int = 2048
    micro: int = 4
    by: str = "ours"
    lever: str = ""
    against: str = ""
    recompute: str = "none"
    data: str = "random"

    def spec(self, smoke: bool, card: s.Card) -> s.RunSpec:
        """The run that is measured, under the engine of one process."""
        length = 64 if smoke else self.length
        _, spec = case(self.model, "plain", self.tuning, length, self.recompute, micro=self.micro)
        spec = replace(spec, loss=s.Loss(LOSSES.get(self.lever, "chunked")), cluster=s.Cluster("one card", 1, 1, card))
        if self.data == "packed":
            spec = replace(spec, data=replace(spec.data, packing="best_fit"))
        if smoke:
            small = replace(shape("tiny"), num_hidden_layers=2)
            spec = replace(spec, model=replace(spec.model, shape=small), precision=s.Precision("fp32"))
        return spec


LOSSES = {"whole logits": "plain", "Liger's loss": "liger"}
PROCESS_LEVERS = ("compiled blocks", "unfused optimizer")


def cases() -> dict[str, Case]:
    """What is measured, the most telling first."""
    big = Case(ANCHORED, "llama3_8b", LORA, 4096, 2)
    one = Case("1b-full", "llama32_1b")
    found = [
        big,
        replace(big, name="8b-lora-trainer", by="trainer", against=ANCHORED),
        one,
        replace(one, name="1b-full-trainer", by="trainer", against=one.name),
        replace(big, name="8b-qlora", tuning=QLORA, lever="4-bit base", against=ANCHORED),
        replace(one, name="1b-full-sample-padded", data="padded"),
        replace(one, name="1b-full-sample-packed", data="packed", lever="packing", against="1b-full-sample-padded"),
        replace(one, name="1b-full-sample-trainer", by="trainer", data="padded", against="1b-full-sample-padded"),
        replace(one, name="1b-full-compiled", lever="compiled blocks", against=one.name),
        replace(one, name="1b-full-logits", lever="whole logits", against=one.name),
        replace(one, name="1b-full-liger", lever="Liger's loss", against=one.name),
        replace(one, name="1b-full-recompute", recompute="full", lever="recompute=full", against=one.name),
        replace(one, name="1b-full-unfused", lever="unfused optimizer", against=one.name),
        replace(big, name="8b-lora-recompute", recompute="full", lever="recompute=full", against=ANCHORED),
        replace(big, name="8b-lora-recompute-trainer", recompute="full", by="trainer", against="8b-lora-recompute"),
        replace(big, name="8b-lora-compiled", lever="compiled blocks", against=ANCHORED),
        replace(big, name="8b-lora-logits", lever="whole logits", against=ANCHORED),
    ]
    return {each.name: each for each in found}


def card_of(name: str) -> s.Card:
    """The card that conf/cluster/card/<name>.yaml describes."""
    fields = yaml.safe_load((CONF / "cluster" / "card" / f"{name}.yaml").read_text())
    fields = fields.get("card", fields)
    memory = fields.pop("memory_mib") * MIB
    return s.Card(memory_bytes=memory, **{key: value for key, value in fields.items() if key in s.Card.__slots__})


class RandomTile:
    """Initial values for every parameter from one small random tensor, repeated: zeros would let the card run cooler."""

    def __init__(self) -> None:
        import torch

        self._tile = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def read(self, name: str, start: int, stop: int, columns: tuple[int, int] | None = None) -> Any:
        assert columns is None, "one process holds whole rows"
        count = stop - start
        return self._tile.repeat(-(-count // self._tile.numel()))[:count]


@dataclass(frozen=True, slots=True)
class Measured:
    """`seconds` of each measured step; learned and all `tokens` of a step without padding, on average; the model's FLOP of a
    step; the allocator's peak; what the planner said of both, None where it knows nothing of the device."""

    seconds: list[float]
    tokens: float
    learned: float
    flop: float
    peak_bytes: int | None
    predicted_seconds: float | None
    predicted_bytes: int | None


def model_flop(spec: s.RunSpec, tokens: float) -> float:
    """FLOP that a step's `tokens` must cost whatever the implementation: forward, gradients of the inputs and, of what learns,
    gradients of the weights: two for each weight and token each (arXiv:2204.02311, appendix B), and causal attention."""
    from orchestrator.planner.predict import shape_for, table_for

    table, dims = table_for(spec), shape_for(spec)
    matrices = [p for p in table if len(p.shape) == 2 and "embed" not in p.name]
    weights = sum((6 if p.trainable else 4) * p.numel for p in matrices)
    width = dims.num_attention_heads * dims.head_dim
    return tokens * (weights + 6 * spec.data.seq_len * width * dims.num_hidden_layers)


def batches(chosen: Case, spec: s.RunSpec) -> Iterator[tuple[Any, int, int]]:
    """(micro-batch, learned tokens, all tokens without padding), endlessly."""
    import torch

    from orchestrator import data
    from orchestrator.data.batch import MicroBatch

    if chosen.data == "random":
        generator = torch.Generator().manual_seed(0)
        size = (spec.batch.micro, spec.data.seq_len)
        while True:
            ids = torch.randint(0, spec.model.shape.vocab_size, size, generator=generator)
            yield MicroBatch(ids, ids.clone()), size[0] * (size[1] - 1), size[0] * size[1]
    tokenizer = data.load_tokenizer(spec.data, None)
    prepared = data.prepare(spec.data, tokenizer, 0, data.cache_folder())
    pad = data.choose_pad_id(tokenizer)
    for step in data.steps(prepared, spec.batch, seed=0, rank=0, ranks=1, pad_id=pad, total_steps=10_000):
        yield step.micro_batches[0], step.labelled, step.tokens


def clocked(step: Callable[[], tuple[int, int]], device: Any, steps: int) -> tuple[list[float], float, float]:
    """(seconds of each step after the warm ones, mean of its tokens, mean of its learned tokens)."""
    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds, counts = [], []
    for number in range(WARM_STEPS + steps):
        finish()
        began = time.perf_counter()
        learned, tokens = step()
        finish()
        if number >= WARM_STEPS:
            seconds.append(time.perf_counter() - began)
            counts.append((tokens, learned))
        if sum(seconds) > SECONDS:
            break
    return seconds, *(statistics.mean(each) for each in zip(*counts, strict=True))


def ours(chosen: Case, spec: s.RunSpec, device: Any, steps: int) -> tuple[list[float], float, float]:
    """Steps of the project's engine, as the loop takes them."""
    from orchestrator import engine as engines
    from orchestrator import model as models
    from orchestrator.engine import optimizers

    if chosen.lever == "unfused optimizer":
        import torch

        optimizers._adamw = lambda tensors, o: torch.optim.AdamW(
            tensors, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )
    engine = engines.make(spec, device, models.loss_sum)
    module = models.build(spec, engine.building())
    engine.adopt(module, RandomTile())
    if chosen.lever == "compiled blocks":
        for block in blocks_of(module):
            block.compile()
    source = batches(chosen, spec)

    def step() -> tuple[int, int]:
        batch, learned, tokens = next(source)
        float(engine.forward_backward(batch, learned, last=True))
        engine.step(spec.optimizer.lr)
        return learned, tokens

    return clocked(step, device, steps)


def blocks_of(module: Any) -> list[Any]:
    names = {name for each in module.modules() for name in (getattr(each, "_no_split_modules", None) or ())}
    return [each for each in module.modules() if type(each).__name__ in names]


def trainer(chosen: Case, spec: s.RunSpec, device: Any, steps: int) -> tuple[list[float], float, float]:
    """The same steps by transformers' Trainer with peft's adapters, bf16, fused AdamW: what its documentation shows."""
    import tempfile
    from itertools import islice, pairwise

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from orchestrator.data.batch import IGNORED
    from orchestrator.model import architecture

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    learns = spec.tuning.adapters
    with device:
        model = AutoModelForCausalLM.from_config(architecture(spec), dtype=dtype if learns else torch.float32)
    if learns:
        lora = LoraConfig(
            r=spec.tuning.rank, lora_alpha=spec.tuning.alpha, target_modules=list(spec.tuning.targets), task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    if spec.recompute == "full":
        model.enable_input_require_grads()
    rows, counts = [], []
    for batch, learned, tokens in islice(batches(chosen, spec), WARM_STEPS + steps):
        counts.append((tokens, learned))
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            kept = int((ids != ids[-1]).nonzero().max()) + 2 if chosen.data == "padded" else len(ids)
            rows.append({"input_ids": ids[:kept], "labels": labels[:kept]})
    moments: list[float] = []

    def now() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    class Clock(TrainerCallback):
        def on_train_begin(self, *unused: Any, **named: Any) -> None:
            now()

        def on_step_end(self, *unused: Any, **named: Any) -> None:
            now()

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([item["input_ids"] for item in items], batch_first=True),
            "labels": pad([item["labels"] for item in items], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad([torch.ones(len(item["labels"])) for item in items], batch_first=True),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=spec.batch.micro, max_steps=WARM_STEPS + steps, save_strategy="no",
            report_to="none", disable_tqdm=True, bf16=device.type == "cuda", use_cpu=device.type == "cpu",
            gradient_checkpointing=spec.recompute == "full", optim="adamw_torch_fused", lr_scheduler_type="constant",
        )  # fmt: skip
        InOrder(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    seconds = [later - earlier for earlier, later in pairwise(moments)][WARM_STEPS:]
    return seconds, *(statistics.mean(each) for each in zip(*counts[WARM_STEPS:], strict=True))


def predicted(spec: s.RunSpec, chosen: Case) -> tuple[float | None, int | None]:
    """(seconds of a step, peak bytes) by the planner; nothing for what it does not plan."""
    from orchestrator.planner.predict import by_layout

    if chosen.by != "ours" or chosen.data == "padded" or chosen.lever in PROCESS_LEVERS:
        return None, None
    plan = by_layout(spec)
    return plan.seconds, plan.memory.used


def measure_one(chosen: Case, smoke: bool, card: s.Card) -> dict[str, Any]:
    """The measurement in this process, which is good for nothing else afterwards; running out of memory is a result."""
    import torch

    device = torch.device("cpu") if smoke else torch.device("cuda", 0)
    spec = chosen.spec(smoke, card)
    work = ours if chosen.by == "ours" else trainer
    try:
        seconds, tokens, learned = work(chosen, spec, device, 2 if smoke else STEPS)
    except torch.OutOfMemoryError as error:
        return {"case": asdict(chosen), "error": f"out of memory: {str(error).splitlines()[0]}"}
    except ModuleNotFoundError as error:
        return {"case": asdict(chosen), "error": f"the package {error.name} is not installed"}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    found = Measured(seconds, tokens, learned, model_flop(spec, tokens), peak, *predicted(spec, chosen))
    return {"case": asdict(chosen), **asdict(found)}


def measure(out: Path, minutes: float, only: str, smoke: bool, card: s.Card) -> int:
    import deepspeed  # noqa: F401  (loaded once, before the forks)
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    warnings.filterwarnings("ignore", category=FutureWarning)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    in_child(lambda: about("cpu" if smoke else "cuda") | {"card_of_plan": asdict(card)}, out / "about.json")
    done = failed = 0
    chosen = [each for each in cases().values() if only in each.name]
    for each in chosen:
        if time.monotonic() > deadline - START_SECONDS[each.model]:
            print(f"not started, the time is over: {each.name}")
            continue
        began = time.monotonic()
        problem = in_child(lambda each=each: measure_one(each, smoke, card), out / f"{each.name}.json")
        done, failed = done + (problem is None), failed + (problem is not None)
        said = "ok    " if problem is None else "FAILED"
        print(f"{said} {time.monotonic() - began:5.1f} s  {each.name}  {problem or ''}", flush=True)
    print(f"{done} measured, {failed} failed, results in {out}")
    return 1 if smoke and failed else 0


def summary(folder: Path, output: Path | None) -> int:
    """A line for each measurement: tokens a second, utilisation, the ratio to what it is held against, and the prediction."""
    information = json.loads((folder / "about.json").read_text())
    peak = information["card_of_plan"]["half_tflops"] * 1e12
    results: dict[str, dict[str, Any]] = {}
    for name in cases():
        path = folder / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    for name, result in results.items():
        if "error" in result:
            print(f"{name:28s} {result['error']}")
            continue
        middle = statistics.median(result["seconds"])
        result |= {
            "tokens_per_second": result["tokens"] / middle, "learned_tokens_per_second": result["learned"] / middle,
            "model_flops_utilisation": result["flop"] / middle / peak,
        }  # fmt: skip
        line = f"{name:28s} {result['tokens_per_second']:9,.0f} tokens/s  MFU {result['model_flops_utilisation']:6.1%}"
        other = results.get(result["case"]["against"])
        if other is not None and "error" not in other:
            result["ratio"] = result["learned_tokens_per_second"] / other["learned_tokens_per_second"]
            line += f"  {result['ratio']:.3f} × {result['case']['against']}"
        if name == ANCHORED:
            result["ratio_to_anchor"] = result["tokens_per_second"] / ANCHOR
            line += f"  {result['ratio_to_anchor']:.3f} of the published {ANCHOR:,.0f}"
        if result["predicted_seconds"]:
            result["measured_to_predicted_seconds"] = middle / result["predicted_seconds"]
            line += f"  step {middle:.3f} s, predicted {result['predicted_seconds']:.3f}"
        if result["predicted_bytes"] and result["peak_bytes"]:
            line += f"  peak {result['peak_bytes'] / GIB:.1f} GiB, predicted {result['predicted_bytes'] / GIB:.1f}"
        print(line)
    if output is not None:
        output.write_text(json.dumps({"about": information, "results": results}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--minutes", type=float, default=9.0)
    measuring.add_argument("--only", default="")
    measuring.add_argument("--smoke", action="store_true")
    measuring.add_argument("--card", default="h100", help="a file of conf/cluster/card, whose peaks the predictions take")
    summing = commands.add_parser("summary")
    summing.add_argument("folder", type=Path)
    summing.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.command == "measure":
        return measure(asked.out, asked.minutes, asked.only, asked.smoke, card_of(asked.card))
    return summary(asked.folder, asked.json)


if __name__ == "__main__":
    sys.exit(main())
