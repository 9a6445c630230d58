"""A rank of a real run whose last rank has room for ROOM samples in a forward: with one more a real allocation inside the last
block fails in the third step, while its peers gather that block's weights or wait for its gradients. WHERE=evaluation: in the
first forward that learns nothing; WHERE=saving: while the second checkpoint is written."""

from __future__ import annotations

import itertools
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the clone goes on the path first

from orchestrator import model as models  # noqa: E402
from orchestrator.train import checkpoint, run  # noqa: E402

FAILS_AT = 3
WHERE = os.environ.get("WHERE", "forward")
LAST = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
seen = 0


def exhaust(*_):
    torch.empty(2**58)


def due(model, batch):
    if not LAST or len(batch.input_ids) <= int(os.environ["ROOM"]):
        return False
    return (WHERE == "forward" and seen >= FAILS_AT) or (WHERE == "evaluation" and not torch.is_grad_enabled())


def loss_sum(model, batch):
    global seen
    seen += 1
    if not due(model, batch):
        return models.loss_sum(model, batch)
    blocks = [module for name, module in model.named_modules() if name.endswith("layers.1.mlp")]
    hook = blocks[0].register_forward_pre_hook(exhaust)
    try:
        return models.loss_sum(model, batch)
    finally:
        hook.remove()


def write_rank(*arguments):
    if LAST and next(saves) == 1:
        exhaust()
    return real_write_rank(*arguments)


real_write_rank, saves = checkpoint._write_rank, itertools.count()
if __name__ == "__main__":
    run.loss_sum = loss_sum
    if WHERE == "saving":
        checkpoint._write_rank = write_rank
    sys.argv[0] = str(ROOT / "launch" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
