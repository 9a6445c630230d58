"""Peak private memory of each rank while it loads a model, as a ratio to its share of the model (bytes ÷ ranks).

    python benchmarks/loading.py [--ranks 4] [--ways WAY …] [--json FILE]

The peer, measured in the same run, is `AutoModelForCausalLM.from_pretrained` on every rank followed by the same sharding:
what a script does that does not think of it. A model of 304 MiB is made for the purpose and removed afterwards. Each way
first loads a small model, so that what the libraries keep for themselves is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ranks import run_ranks  # noqa: E402

WAYS = (
    "from_pretrained fp32",
    "from_pretrained bf16",
    "fsdp=full_shard",
    "fsdp=full_shard bf16",
    "zero=stage3",
    "zero=stage3 offload=cpu",
)
POLL_SECONDS = 0.001


def private_bytes() -> int:
    """Anonymous resident memory of this process: file pages of a memory-mapped checkpoint are not its own (Linux)."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak:
    """Highest `private_bytes` while it is entered, less those at its start."""

    def __enter__(self) -> Peak:
        self.start = self.highest = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.highest = max(self.highest, private_bytes())
            time.sleep(POLL_SECONDS)

    def __exit__(self, *_: object) -> None:
        self.highest = max(self.highest, private_bytes())
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.highest - self.start


def make_model(folder: Path, hidden: int) -> None:
    """A Llama in fp32 as several safetensors files: 80 M parameters (304 MiB) for `hidden` 1024."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 8 * hidden, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")


def measure(way: str, folder: Path, output: Path) -> None:
    """One rank: load in one way up to the sharded module, before an optimizer exists; rank 0 writes what all saw."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    load = _peer if way.startswith("from_pretrained") else _ours
    load(way, folder / "small", ranks)
    gc.collect()
    grown = load(way, folder / "large", ranks)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, grown)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(everyone))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own teardown may end a process whose gloo threads still run; what was measured is written


def _peer(way: str, folder: Path, ranks: int) -> int:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if way.endswith("bf16") else torch.float32)
        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return peak.growth


def _ours(way: str, folder: Path, ranks: int) -> int:
    import torch

    from orchestrator import engine as engines
    from orchestrator import model as models
    from orchestrator.config import compose

    words = way.removesuffix(" bf16").split()
    precision = "bf16" if way.endswith("bf16") else "fp32"
    spec = compose([*words, f"model.path={folder}", f"precision={precision}", "data.seq_len=64"], ranks=ranks)
    engine: Any = engines.make(spec, torch.device("cpu"), models.loss_sum)
    with Peak() as peak:
        module = models.build(spec, engine.building())
        table = models.table_of(module)
        weights = models.open_weights(spec, table)
        if spec.strategy.engine == "deepspeed":
            # Up to the filled partitions: initialize() then adds the masters and moments that the Layout lists.
            engine._fill_partitions(module, weights)
        else:
            engine.adopt(module, weights)
    return peak.growth


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"of: {', '.join(WAYS)}")
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch), Path(scratch) / "out.json"
        make_model(folder / "small", hidden=64)
        make_model(folder / "large", hidden=1024)
        size = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
        share = size // asked.ranks
        print(f"model {size / 2**20:.0f} MiB, {asked.ranks} ranks, share of a rank {share / 2**20:.0f} MiB")
        results = {}
        for way in asked.ways:
            ended = run_ranks(Path(__file__), ["--rank", way, str(folder), str(output)], asked.ranks, timeout=300)
            if any(code for code, _ in ended):
                sys.exit("\n".join(text[-2000:] for _, text in ended))
            grown = json.loads(output.read_text())
            results[way] = {"peak_bytes": grown, "ratio_to_share": round(max(grown) / share, 3)}
            print(f"{way:26s} worst rank +{max(grown) / 2**20:5.0f} MiB = {max(grown) / share:.2f} x its share")
    if asked.json:
        import deepspeed
        import torch
        import transformers

        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "transformers": transformers.__version__}
        processor = subprocess.run(["uname", "-sm"], capture_output=True, text=True, check=True).stdout.strip()
        about = {
            "command": f"python benchmarks/loading.py --ranks {asked.ranks}",
            "machine": f"{os.cpu_count()} CPU cores, {processor}, Python {platform.python_version()}",
            "model_bytes": size,
            "share_bytes": share,
            "versions": versions,
        }
        asked.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
