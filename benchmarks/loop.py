"""What the loop costs: our steps ÷ those of the bare engine, in the same processes, a block of one after a block of the other.

    python benchmarks/loop.py [--pairs 15] [--block 2] [--only WORDS] [key=value …]

Ours is a whole run (`train/run.py`: data in the background, metrics, watch, screen, census), as `launch/train.py` makes it. The
peer is what a person writes by hand over the same micro-batches: DeepSpeed's own engine under the same JSON, or `fully_shard`
over the blocks and the root, with the same model, loss, optimizer and clipping, and no more than the steps. Compared are
seconds of the processor, which other work on the machine moves less, and of the clock. `outside` is what the main thread of
rank 0 spends on a step outside the engine's two methods: batches, learning rate, sums, metrics, screen. Rows are packed, so
that all have one length: the side that goes first would else pay for memory of every new shape, and the other find it there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import account  # noqa: E402
from ranks import run_ranks  # noqa: E402

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "67108864"}
"""The C library keeps freed memory for both sides: fresh pages for every large tensor took half of a step, and most of the
noise."""

STRATEGIES = ("zero=stage2", "zero=stage3", "fsdp=full_shard")
SHAPE = (
    "model.hidden_size=256", "model.intermediate_size=768", "model.num_hidden_layers=6", "model.num_attention_heads=4",
    "model.num_key_value_heads=4", "model.head_dim=64",
)  # fmt: skip
RUN = (
    "precision=fp32", "batch.global_size=8", "batch.micro=2", "data.seq_len=128", "data.packing=best_fit",
    "checkpoint.every=0", "export.format=none", "plan.on_misfit=ignore",
)  # fmt: skip
Step = Callable[[Any], None]
"""One optimizer step of the peer, from our `StepBatch`."""


def bare_deepspeed(spec: Any) -> Step:
    """DeepSpeed's engine by hand."""
    import contextlib

    import deepspeed
    import torch

    from orchestrator import model as models
    from orchestrator.layout import lower

    config = lower(spec)
    config["gradient_accumulation_steps"] = spec.batch.accumulation
    inside = deepspeed.zero.Init(config_dict_or_path=config) if spec.strategy.stage == 3 else contextlib.nullcontext()
    model = models.build(spec, inside)
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=spec.strategy.stage == 3):
            _draw(torch, parameter)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=_adamw(torch, trained, spec), config=config)
    ranks = spec.strategy.ranks

    def step(batch: Any) -> None:
        for micro in batch.micro_batches:
            loss = models.loss_sum(engine, micro) * (ranks / batch.labelled)
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()

    return step


def bare_fsdp(spec: Any) -> Step:
    """`fully_shard` by hand."""
    import contextlib

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from orchestrator import model as models

    model: Any = models.build(spec, contextlib.nullcontext())
    for parameter in model.parameters():
        _draw(torch, parameter)
    mesh = init_device_mesh("cpu", (spec.strategy.ranks,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = list(model.parameters())
    optimizer, ranks = _adamw(torch, trained, spec), spec.strategy.ranks

    def step(batch: Any) -> None:
        for micro in batch.micro_batches:
            (models.loss_sum(model, micro) * (ranks / batch.labelled)).backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _draw(torch: Any, parameter: Any) -> None:
    """Usual first values: what is not yet initialised may hold numbers that a processor computes slowly, or fast."""
    with torch.no_grad():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)


def _adamw(torch: Any, trained: list[Any], spec: Any) -> Any:
    o = spec.optimizer
    return torch.optim.AdamW(trained, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


class Inside:
    """Seconds of the main thread inside the engine's methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watching(self, engine: Any) -> Any:
        """`engine`, with its two methods of a step on the clock."""
        for name in ("forward_backward", "step"):
            setattr(engine, name, self._clocked(getattr(engine, name)))
        return engine

    def _clocked(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - began

        return clocked


class Turns:
    """The steps of a run, handed out in blocks; after each of our blocks the peer takes the same steps."""

    def __init__(self, steps: Iterator[Any], peer: Step, block: int, inside: Inside) -> None:
        self._steps, self._peer, self._block, self._inside = steps, peer, block, inside
        self.outside: list[float] = []
        self.ours: list[account.Cost] = []
        self.theirs: list[account.Cost] = []

    def __iter__(self) -> Iterator[Any]:
        import torch.distributed as dist

        held: list[Any] = []
        dist.barrier()
        began, main = self._now(), self._main()
        for batch in self._steps:
            held.append(batch)
            yield batch  # the loop comes back for the next when it is through with this one
            if len(held) < self._block:
                continue
            self.outside.append((self._main() - main) / self._block)
            dist.barrier()
            self.ours.append(self._since(began))
            began = self._now()
            for each in held:
                self._peer(each)
            dist.barrier()
            self.theirs.append(self._since(began))
            held = []
            began, main = self._now(), self._main()

    def _main(self) -> float:
        return time.thread_time() - self._inside.seconds

    def _now(self) -> account.Cost:
        return account.Cost(time.process_time(), time.perf_counter())

    def _since(self, began: account.Cost) -> account.Cost:
        now = self._now()
        return account.Cost((now.cpu - began.cpu) / self._block, (now.wall - began.wall) / self._block)


def rank(strategy: str, folder: Path, pairs: int, block: int, further: list[str]) -> None:
    """One rank: a run in which the peer takes turns; rank 0 writes what all have spent."""
    from orchestrator import data
    from orchestrator.config import compose
    from orchestrator.train import run
    from orchestrator.train.world import join, leave

    words = [strategy, *SHAPE, *RUN, *further, f"run.steps={(pairs + 1) * block}", f"run.dir={folder / 'run'}"]
    spec = compose(words, ranks=int(os.environ["WORLD_SIZE"]))
    world = join("cpu")
    turns: list[Turns] = []
    inside, ours, make = Inside(), data.steps, run.make

    def taking_turns(*arguments: Any, **named: Any) -> Iterator[Any]:
        bare = bare_fsdp if strategy.startswith("fsdp") else bare_deepspeed
        turns.append(Turns(ours(*arguments, **named), bare(spec), block, inside))
        return iter(turns[0])

    data.steps = taking_turns  # the run asks its room for them by this name
    run.make = lambda *arguments: inside.watching(make(*arguments))
    run.Run(spec, world).execute()
    costs = world.gather([[(c.cpu, c.wall) for c in side] for side in (turns[0].ours, turns[0].theirs)])
    if world.first:
        (folder / "costs.json").write_text(json.dumps({"costs": costs, "outside": turns[0].outside}))
    leave()
    sys.stdout.flush()
    os._exit(0)  # two engines and gloo's threads: what was measured is written


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of processor seconds (summed over the ranks) and of clock seconds, the first pair left out, and `outside`."""
    costs = found["costs"]
    cpu, wall = (
        [
            [combine(each) for each in zip(*(ranked[side] for ranked in made), strict=True)][1:]
            for side in (0, 1)
        ]
        for made, combine in (
            ([[[cost[0] for cost in side] for side in ranked] for ranked in costs], sum),
            ([[[cost[1] for cost in side] for side in ranked] for ranked in costs], max),
        )
    )  # fmt: skip
    outside = statistics.median(found["outside"][1:])
    share = {
        "seconds_a_step": round(outside, 6),
        "share_of_our_step": round(outside * len(costs) / statistics.median(cpu[0]), 4),
    }
    return {
        "cpu_seconds_a_step": account.ratio(*cpu), "wall_seconds_a_step": account.ratio(*wall), "outside_the_engine": share,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--block", type=int, default=2, help="steps in a block")
    parser.add_argument("--only", default="", help="strategies whose words hold this")
    parser.add_argument("further", nargs="*", metavar="key=value", help="on top of the run's configuration")
    asked = parser.parse_args()
    os.environ.update(KEPT_MEMORY)
    results = {}
    for strategy in (each for each in STRATEGIES if asked.only in each):
        with tempfile.TemporaryDirectory() as scratch:
            arguments = ["--rank", strategy, scratch, str(asked.pairs), str(asked.block), *asked.further]
            ended = run_ranks(Path(__file__), arguments, 2, timeout=900)
            if any(code for code, _ in ended):
                sys.exit("\n".join(text[-3000:] for _, text in ended))
            results[strategy] = summary(json.loads((Path(scratch) / "costs.json").read_text()))
        found = results[strategy]
        cpu, wall = found["cpu_seconds_a_step"], found["wall_seconds_a_step"]
        print(
            f"{strategy:16s} processor {cpu['ours']:.4f} ÷ {cpu['theirs']:.4f} s = {cpu['ratio']:.3f} {cpu['middle_half']}, "
            f"clock {wall['ratio']:.3f} {wall['middle_half']}, "
            f"outside the engine {found['outside_the_engine']['share_of_our_step']:.2%}",
            flush=True,
        )
        if not asked.further:
            packages = account.versions("torch", "deepspeed", "transformers")
            command = f"python benchmarks/loop.py --pairs {asked.pairs} --block {asked.block} --only {strategy}"
            account.write(f"loop-{strategy.partition('=')[2]}-cpu", command, packages, found)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
    else:
        sys.exit(main())
