"""Peak memory and time of the loss of 4,096 tokens over 128,256 words, chunked against whole logits, forward and backward.

`python benchmarks/loss/head.py` writes benchmarks/results/loss-head-cpu.json. Each way runs in its own process; the peak
is the sum of the living tensors that the tracer saw beyond the head's weight, the hidden states and their gradients, which each
way must hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "loss-head-cpu.json"
TOKENS, WIDTH, WORDS, CHUNK = 4096, 256, 128_256, 512
WAYS = [
    (kind, head, dtype) for dtype in ("float32", "bfloat16") for head in ("trained", "frozen") for kind in ("plain", "chunked")
]


def run(kind: str, head: str, dtype: str) -> dict[str, Any]:
    """Peak bytes beyond what is given and asked for, seconds, and the loss, of one forward and backward."""
    import torch
    from torch import nn

    from orchestrator.data.batch import MicroBatch
    from orchestrator.model.head import use_head
    from orchestrator.model.loss import loss_sum
    from orchestrator.planner.tracer import Tracer
    from orchestrator.spec import Loss

    class Head(nn.Module):
        """As much of a causal language model as the loss needs."""

        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"model_type": "llama"})()
            self.lm_head = nn.Linear(WIDTH, WORDS, bias=False, dtype=getattr(torch, dtype))
            self.lm_head.weight.requires_grad_(head == "trained")

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": self.lm_head(hidden)})()

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = Head()
    use_head(model, Loss(kind, CHUNK))
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=getattr(torch, dtype), requires_grad=True)
    ids = torch.randint(0, WORDS, (1, TOKENS))
    tracer = Tracer({"cpu": "gpu"})
    began = time.perf_counter()
    with tracer:
        tracer.enter_phase("load")
        given = [tensor.view_as(tensor) for tensor in (hidden, model.lm_head.weight)]
        resting = tracer.trace().peak()
        tracer.enter_phase("forward")
        loss = loss_sum(model, MicroBatch(ids, ids))
        loss.backward()
    seconds = time.perf_counter() - began
    asked = sum(tensor.grad.nbytes for tensor in (hidden, model.lm_head.weight) if tensor.grad is not None)
    del given
    peak = tracer.trace().peak() - resting - asked
    return {"peak_mib": round(peak / 2**20), "seconds": round(seconds, 2), "loss": float(loss.detach()) / (TOKENS - 1)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(run(*sys.argv[1:])))
        return
    rows = []
    for kind, head, dtype in WAYS:
        done = subprocess.run([sys.executable, __file__, kind, head, dtype], capture_output=True, text=True, check=True)
        rows.append({"loss_kind": kind, "head": head, "dtype": dtype, **json.loads(done.stdout)})
        print(rows[-1], flush=True)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    ratios = {f"{p['head']} {p['dtype']}": round(p["peak_mib"] / c["peak_mib"], 1) for p, c in pairs}
    shape = {"tokens": TOKENS, "hidden": WIDTH, "vocabulary": WORDS, "chunk": CHUNK}
    RESULT.write_text(json.dumps({"shape": shape, "rows": rows, "plain_over_chunked": ratios}, indent=1) + "\n")
    print(ratios)


if __name__ == "__main__":
    main()
