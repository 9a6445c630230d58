"""Published rows as runs: what can be expressed, with which meter, and how the score is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.planner.predict import table_for
from orchestrator.planner.programme import CHUNKED, DRAWN, EARLIER, KEPT, Programme
from orchestrator.planner.published import (
    AFTER_FORWARD,
    ALLOCATED,
    DEVICE,
    FITS,
    RESERVED,
    Expressed,
    express,
)
from orchestrator.planner.published_score import Score, score
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
        ("MiB, nvidia-smi", DEVICE, 10 * 2**20),
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
        ({"optimizer": "SGD"}, "optimizer SGD"),
        ({"engine": "fsdp1 full_shard (wrap=Block)"}, "one flat parameter"),
        ({"fused_ce": "of our own"}, "loss of our own"),
        ({"act_ckpt": "2 of 3 blocks"}, "recompute 2 of 3 blocks"),
        ({"seq_len": "alpaca variable"}, "length not stated as a number"),
        ({"micro_batch": "0"}, "micro-batch is 0"),
        ({"n_gpus": ""}, "number of cards not stated"),
        ({"measured_gb": "about ten"}, "not stated as a number"),
        ({"unit": "OOM", "gpu": "a card of ours"}, "card a card of ours"),
        ({"model": "ours/secret-7b"}, "not one of the known families"),
        ({"lora_targets": "q_proj, router"}, "LoRA rank 64 on q_proj, router"),
        ({"unit": "GB as printed"}, "does not say which meter"),
        ({"offload": "optimizer cpu"}, "is not what FSDP2 does"),
        ({"engine": "none", "offload": "cpu params"}, "without a sharding engine"),
        ({"engine": "deepspeed zero3", "offload": "nvme params"}, "NVMe"),
        ({"engine": "none"}, "engine none on 2 cards"),
    ],
)
def test_what_cannot_be_expressed_says_why(base, change, reason):
    found = express({**ROW, **change}, base)
    assert isinstance(found, str) and reason in found


def test_models_have_the_published_number_of_parameters():
    counts = {
        "Llama-2-7b": 6.738, "vicuna-13b": 13.016, "Llama 2 70B": 68.977, "llama-30b": 32.529, "llama-65b": 65.286,
        "CodeLlama-7b": 6.739, "CodeLlama-34b": 33.744, "TinyLlama-1.1B": 1.1, "Llama-3.2-1B": 1.236, "Llama-3.2-3B": 3.213,
        "Meta-Llama-3.1-8B": 8.03, "Llama-3.3-70B": 70.554, "Yi-6B": 6.061, "Yi-34B": 34.389, "Mistral-7B": 7.242,
        "qwen-1_8b-chat": 1.837, "qwen-7b": 7.721, "qwen-14b": 14.167, "qwen-72b": 72.288, "Qwen2-0.5B": 0.494,
        "Qwen2.5-1.5B": 1.544, "Qwen2.5-3B": 3.086, "Qwen2.5-7B": 7.616, "Qwen2.5-14B": 14.770, "Qwen2.5-32B": 32.764,
        "Qwen2.5-72B": 72.706, "Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191,
        "Qwen3-14B": 14.768, "Qwen3-32B": 32.762, "gemma-2b": 2.506, "gemma-7b": 8.538,
    }  # fmt: skip
    base = compose(["model=tiny"])
    for name, billions in counts.items():
        run = express({**ROW, "model": name}, base)
        assert isinstance(run, Expressed) and run.spec.model.shape is not None, name
        assert sum(p.numel for p in parameters(run.spec.model.shape)) == pytest.approx(billions * 1e9, rel=0.002), name


def test_the_words_of_a_row_become_the_keys_of_a_run(base):
    run = express({**ROW, "attention": "eager", "act_ckpt": "selective (per-op SAC)", "fused_ce": "liger"}, base)
    assert isinstance(run, Expressed)
    assert (run.spec.attention, run.spec.recompute, run.spec.loss.kind) == ("eager", "selective", "liger")
    zero = express({**ROW, "engine": "deepspeed zero-3 (auto)", "offload": "cpu optimizer+params", "n_gpus": "4"}, base)
    assert isinstance(zero, Expressed) and zero.spec.strategy.buckets is not None
    assert (zero.spec.strategy.label, zero.spec.strategy.buckets.reduce) == ("zero3-cpu", 4096**2)


def test_a_family_without_a_table_is_built_from_its_config(base):
    counts = {
        "tiiuae/falcon-7b": 6.922, "microsoft/phi-2": 2.78, "EleutherAI/pythia-1b": 1.012, "facebook/opt-1.3b": 1.316,
        "google/gemma-2-2b": 2.614, "bigscience/bloom-560m": 0.559,
    }  # fmt: skip
    for name, billions in counts.items():
        run = express({**ROW, "model": name}, base)
        assert isinstance(run, Expressed) and not run.countable, name
        adapters = 64 * sum(sum(p.shape) for p in table_for(run.spec) if ".base_layer.weight" in p.name)
        assert sum(p.numel for p in table_for(run.spec)) - adapters == pytest.approx(billions * 1e9, rel=0.002), name
    told = {"falcon-7b": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"), "gemma-2-2b": ("q_proj", "k_proj", "v_proj")}
    for name, targets in told.items():
        run = express({**ROW, "model": name}, base)
        assert isinstance(run, Expressed) and run.spec.tuning.targets[: len(targets)] == targets


def test_habits_of_other_loops_are_read_from_the_row(base):
    def programme(**change: str) -> Programme:
        run = express({**ROW, **change}, base)
        assert isinstance(run, Expressed) and run.programme is not None
        return run.programme

    assert programme() == Programme((), EARLIER, masters=False, foreach=True)
    assert programme(source="AnswerDotAI/fsdp_qlora@05ed9f2").loss == KEPT
    assert programme(precision="bf16", optimizer="adamw_torch_fused") == Programme((), EARLIER)
    assert programme(engine="none", n_gpus="1", method="full", precision="bf16").masters is False
    assert programme(engine="zero2", method="full", precision="bf16") == Programme((), EARLIER)
    assert programme(fused_ce="chunked (8)").loss == CHUNKED
    varied = programme(notes="news, 3,234+-2547 tokens before filtering", seq_len="4096").lengths
    assert len(varied) == DRAWN and max(varied) == varied[-1] and varied[-1] <= 4096 and len(set(varied)) > DRAWN // 2
    low = express({**ROW, "optimizer": "bnb PagedAdamW8bit"}, base)
    assert isinstance(low, Expressed) and low.spec.optimizer.name == "paged_adamw_8bit"
    every = express({**ROW, "act_ckpt": "every 2nd layer"}, base)
    assert isinstance(every, Expressed) and (every.spec.recompute, every.spec.recompute_every) == ("every_n", 2)


ODD = """\ufeffid;model;gpu;n_gpus;method;precision;engine;act_ckpt;seq_len;micro_batch;measured_gb;unit;lora_rank;lora_targets
;Mistral 7B;A100 80GB;1;LoRA;bf16;none;no;2,048;1;~21.9;GiB, max_memory_allocated;r=16;q_proj, v_proj;red;hue
b;unheard-of/model-7b;TPU v4;one;galore;fp4;colossal;maybe;long;few;lots;furlongs;;;
c;Qwen2.5 7B;RTX 4090;2;full;bf16;deepspeed zero2;yes;1024;1;45.0;GB, nvidia-smi;;;blue
d;Llama-2-7b;A100-80GB;0;full;fp32;ddp;no;512;1;80;GiB, max_memory_reserved
e;Llama-2-7b;H200;1;full;fp32;ddp;no;512;-1;80;GiB, max_memory_allocated;;;;;;too;many
f;Llama-2-7b;H200;1;full;float32;ddp;no;512;1;0;MiB, max_memory_allocated
"""
"""Semicolons, a byte order mark, no quality, no loss, no attention, unknown words, rows too short and too long."""


def test_an_odd_file_is_scored_or_refused_row_by_row(tmp_path):
    (tmp_path / "odd.csv").write_text(ODD, encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "memory" / "score.py"), "odd.csv", "--json", "--basis=layout"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True)
    told = json.loads(done.stdout)
    assert "Traceback" not in done.stderr
    assert {row["id"]: row["meter"] for row in told["rows"]} == {"row-1": ALLOCATED, "c": DEVICE}
    assert {row["id"]: row["reason"] for row in told["unexpressed"]} == {
        "b": "method galore: the project has full, LoRA and QLoRA",
        "d": "number of cards is 0",
        "e": "micro-batch not stated as a number",
        "f": "nothing was measured",
    }
    missing = subprocess.run([*command[:2], "none.csv"], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert missing.returncode == 2 and "cannot be read" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.skipif(not TABLE.exists(), reason="needs ../shared/published_memory.csv")
def test_the_score_of_the_table_is_told(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "memory" / "score.py"), str(TABLE)]
    done = subprocess.run(
        [*command, "--basis=layout", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True
    )
    told = json.loads(done.stdout)
    every = next(part for part in told["summary"] if part["source"] == "all")
    assert every["rows"] >= 90 and len(told["rows"]) + len(told["unexpressed"]) == 175
    allocated = [row for row in told["rows"] if row["source"] == "liger"]  # the other source is of code from 2023
    assert all(abs(row["error"]) < 0.12 for row in allocated) and len(allocated) == 4
