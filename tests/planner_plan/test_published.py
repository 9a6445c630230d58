"""Published rows as runs: what can be expressed, with which meter, and how the score is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.planner.published import (
    AFTER_FORWARD,
    ALLOCATED,
    FITS,
    MODELS,
    RESERVED,
    Expressed,
    Score,
    express,
    score,
)
from orchestrator.spec import Engine, Home, RunSpec, parameters
from orchestrator.units import GIB

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT.parent / "shared" / "published_memory.csv"

ROW = {
    "id": "mine-001", "model": "meta-llama/Llama-2-7b-hf", "gpu": "A100-80GB", "n_gpus": "2", "method": "lora",
    "lora_rank": "64", "lora_targets": "k,q,v,up,down,gate", "precision": "bf16 (all, incl. adapters)",
    "optimizer": "AdamW", "engine": "fsdp1 full_shard", "offload": "none", "act_ckpt": "yes", "attention": "sdpa",
    "fused_ce": "no", "seq_len": "2048", "micro_batch": "1", "measured_gb": "10", "quality": "A",
    "unit": "GiB, torch max_memory_reserved (peak)",
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> RunSpec:
    return compose(["model=tiny"])


def test_a_row_becomes_a_run(base):
    run = express(ROW, base)
    assert isinstance(run, Expressed) and (run.meter, run.measured) == (RESERVED, 10 * GIB)
    assert run.spec.strategy.engine is Engine.FSDP and run.spec.strategy.ranks == 2 and run.spec.recompute == "full"
    assert run.spec.tuning.rank == 64 and "o_proj" not in run.spec.tuning.targets
    offloaded = express({**ROW, "offload": "cpu params+grads (FSDP CPUOffload)"}, base)
    assert isinstance(offloaded, Expressed) and offloaded.spec.strategy.parameter_home is Home.CPU


def test_a_quantised_row_says_whether_its_scales_are_too(base):
    row = {**ROW, "method": "qlora", "precision": "bf16 (all, incl. adapters) + bnb NF4"}
    for precision, form in ((row["precision"], "nf4-double"), (f"{row['precision']}, no double quant", "nf4")):
        run = express({**row, "precision": precision}, base)
        assert isinstance(run, Expressed) and run.spec.tuning.form == form


@pytest.mark.parametrize(
    ("unit", "meter", "size"),
    [
        ("GB 1e9, torch max_memory_allocated", ALLOCATED, 10 * 10**9),
        ("GiB, peak RESERVED (bar height read by pixel)", RESERVED, 10 * GIB),
        ("GB 1e9, torch memory_allocated() AFTER forward (not peak)", AFTER_FORWARD, 10 * 10**9),
    ],
)
def test_the_meter_is_that_of_the_unit(base, unit, meter, size):
    run = express({**ROW, "unit": unit}, base)
    assert isinstance(run, Expressed) and (run.meter, run.measured) == (meter, size)


def test_an_outcome_is_scored_as_fit_or_not(base):
    out = score({**ROW, "unit": "OOM (24 GB)", "measured_gb": "", "gpu": "RTX 3090", "micro_batch": "64"}, base)
    assert isinstance(out, Score) and out.meter == FITS and out.right is True
    ran = score({**ROW, "unit": "CAPACITY BOUNDARY: max context that fits", "gpu": "A100-80GB"}, base)
    assert isinstance(ran, Score) and ran.right is True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "galore"}, "the project has full, LoRA and QLoRA"),
        ({"method": "qlora", "precision": "bf16 compute + int4 (gptq)"}, "the project's QLoRA is bitsandbytes' NF4"),
        ({"precision": "bf16 compute + int8 (gptq)"}, "precision bf16 compute"),
        ({"precision": "bf16-mixed (fp32 weights, autocast)"}, "fp32 weights under autocast"),
        ({"method": "full", "engine": "none", "n_gpus": "1"}, "keeps an fp32 master"),
        ({"fused_ce": "yes (FusedLinearCE)"}, "neither chunked nor fused"),
        ({"attention": "eager"}, "eager attention"),
        ({"act_ckpt": "selective (per-op SAC)"}, "recompute selective"),
        ({"seq_len": "alpaca variable"}, "not stated as a number"),
        ({"model": "tiiuae/falcon-7b"}, "not one of the known families"),
        ({"lora_targets": "W_pack"}, "LoRA rank 64 on W_pack"),
        ({"unit": "GB as printed"}, "does not say which meter"),
        ({"offload": "optimizer cpu"}, "is not what FSDP2 does"),
        ({"engine": "none", "offload": "cpu params"}, "without a sharding engine"),
        ({"engine": "deepspeed zero3"}, "bucket sizes is not stated"),
        ({"engine": "none"}, "engine none"),
    ],
)
def test_what_cannot_be_expressed_says_why(base, change, reason):
    found = express({**ROW, **change}, base)
    assert isinstance(found, str) and reason in found


def test_models_have_the_published_number_of_parameters():
    counts = {
        r"llama-?2-7b": 6.738, r"llama-?2-13b": 13.016, r"llama-?3(\.1)?-8b": 8.03, r"yi-6b": 6.061, r"yi-34b": 34.389,
        r"^qwen-7b": 7.721, r"^qwen-1_8b": 1.837, r"qwen2(\.5)?-7b": 7.616, r"zephyr-7b|mistral-7b": 7.24, r"gemma-7b": 8.538,
    }  # fmt: skip
    known = dict(MODELS)
    for pattern, billions in counts.items():
        assert sum(p.numel for p in parameters(known[pattern])) == pytest.approx(billions * 1e9, rel=0.002), pattern


@pytest.mark.skipif(not TABLE.exists(), reason="needs ../shared/published_memory.csv")
def test_the_score_of_the_table_is_told(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "memory" / "score.py"), str(TABLE)]
    done = subprocess.run(
        [*command, "--basis=layout", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    )
    told = json.loads(done.stdout)
    every = next(part for part in told["summary"] if part["source"] == "all")
    assert every["rows"] >= 50 and len(told["rows"]) + len(told["unexpressed"]) == 175
    allocated = [row for row in told["rows"] if row["meter"] == ALLOCATED]
    assert all(abs(row["error"]) < 0.12 for row in allocated) and allocated
    text = subprocess.run(
        [*command, "--basis=layout"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True
    ).stdout
    assert "9th dec." in text and "rows cannot be expressed" in text
