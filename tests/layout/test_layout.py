"""The layout and its lowering: round trips, pinned files, and the libraries that must take what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contract.cases import Case, all_cases, run_spec
from strategies import strategies, swapping

from orchestrator.errors import LayoutDrift
from orchestrator.layout import (
    LOADED,
    STEPPED,
    Layout,
    Row,
    accelerate_config,
    check_census,
    lay_out,
    lower,
    parameter_table,
    read_back,
)
from orchestrator.spec import ROOT, Buckets, Engine, Home, Parameter, Shard, Strategy

GOLDEN = Path(__file__).parents[1] / "golden"
PROJECT = Path(__file__).parents[2]


def spec_of(name: str, tuning: str = "full", compute: str = "bf16", ranks: int = 4) -> Any:
    own = swapping(ranks).get(name)
    return run_spec(Case("zero3" if own else name, tuning, compute, 1), ranks, own)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_what_is_lowered_reads_back_as_it_was(ranks: int) -> None:
    for name, strategy in (strategies(max(2, ranks)) | swapping(max(2, ranks))).items():
        for compute in ("fp32", "bf16", "fp16"):
            spec = spec_of(name, compute=compute, ranks=max(2, ranks))
            found, batch, dtype, clip = read_back(json.loads(json.dumps(lower(spec))))
            expected = strategy
            if strategy.engine is Engine.DEEPSPEED and strategy.shard is not Shard.PARAMETERS and strategy.buckets:
                unused, defaults = strategy.buckets, Buckets()  # knobs that only stage 3 has do not travel
                expected = replace(
                    strategy,
                    buckets=replace(
                        unused, prefetch=defaults.prefetch, persistence=defaults.persistence,
                        max_live=defaults.max_live, max_reuse=defaults.max_reuse,
                    ),
                )  # fmt: skip
            assert (found, batch, dtype, clip) == (expected, spec.batch, compute, spec.optimizer.clip)


@pytest.mark.parametrize("name", [*strategies(4), *swapping(4), "plain"])
def test_golden_lowering(name: str) -> None:
    spec = replace(spec_of("zero1"), strategy=Strategy(Engine.PLAIN, Shard.NONE)) if name == "plain" else spec_of(name)
    hold(name, spec)


@pytest.mark.parametrize("name", ["full_shard", "plain"])
def test_golden_lowering_of_a_quantised_base(name: str) -> None:
    spec = spec_of("zero1" if name == "plain" else name, "nf4x2")
    hold(f"{name}_nf4x2", replace(spec, strategy=Strategy(Engine.PLAIN, Shard.NONE)) if name == "plain" else spec)
    assert lower(spec_of("full_shard", "int8"))["quantised"] == {"format": "int8", "storage_dtype": "bf16"}


def hold(name: str, spec: Any) -> None:
    """Compare the lowering with its pinned file, or write that."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(lower(spec), indent=2) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, f"the lowering of {name} changed; if that was meant, run again with UPDATE_GOLDEN=1"


@pytest.mark.parametrize("name", [name for name, s in (strategies(4) | swapping(4)).items() if s.engine is Engine.DEEPSPEED])
def test_deepspeeds_own_config_model_takes_it(name: str) -> None:
    """In a process of its own: DeepSpeed's config reads the world size from the environment."""
    code = (
        "import json, sys; from deepspeed.runtime.config import DeepSpeedConfig\n"
        "config = json.load(sys.stdin); made = DeepSpeedConfig(config, mesh_device=None)\n"
        "zero = made.zero_config.model_dump(by_alias=True)\n"
        "asked = {k: v for k, v in config['zero_optimization'].items() if not isinstance(v, dict)}\n"
        "wrong = {k: (v, zero.get(k)) for k, v in asked.items() if zero.get(k) != v}\n"
        "assert not wrong, wrong\n"
        "assert made.gradient_accumulation_steps == config['gradient_accumulation_steps']\n"
    )
    spec = spec_of(name)
    batch = replace(spec.batch, micro=spec.batch.global_size // spec.batch.accumulation)
    spec = replace(spec, batch=batch, strategy=replace(spec.strategy, dp_shard=1))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(lower(spec)), text=True, capture_output=True,
        env=environment, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_padding_and_rank_decide_the_rows() -> None:
    """17 rows over 4 ranks are 5, 5, 5 and 2: FSDP2 stores 5 on each, and the last rank's moments are of 2."""
    spec = spec_of("full_shard")
    table = parameter_table(spec)
    assert table is not None
    head = next(p for p in table if p.name == "lm_head.weight")
    assert head.shape == (257, 48)
    first, last = lay_out(spec, [head], rank=0), lay_out(spec, [head], rank=3)
    assert [row.elements for row in first.rows] == [0, 65 * 48, 2 * 65 * 48]
    assert [row.elements for row in last.rows] == [0, 65 * 48, 2 * 62 * 48]
    assert last.rows[1].padding == 3 * 48


def test_weights_that_stay_whole_under_zero3_stay_with_the_padding_of_their_parts() -> None:
    """Five norms of 48: on five ranks DeepSpeed gathers five parts of 10 for each and keeps a view of them."""
    spec = spec_of("zero3")
    spec = replace(spec, strategy=replace(spec.strategy, dp_shard=5))
    table = parameter_table(spec)
    assert table is not None
    row = next(row for row in lay_out(spec, table).rows if row.line == "persistent")
    assert (row.elements, row.padding) == (5 * 50, 5 * 2)


def test_a_quantised_base_rests_packed_and_its_scales_whole() -> None:
    """q_proj of 48 × 48: 2304 weights of half a byte are 288 elements of fp32 in 4 parts; 36 scales of a byte are on each rank,
    with a table of 256 values, the scale of their one block and their mean."""
    for name, ranks in (("zero2", 1), ("zero3", 4), ("full_shard", 4)):
        spec = spec_of(name, "nf4x2", "fp32")
        table = parameter_table(spec)
        assert table is not None
        query = next(p for p in table if p.name.endswith("q_proj.base_layer.weight"))
        assert (query.shape, query.quant) == ((48, 48), "nf4-double")
        held = {(row.line, row.dtype): row for row in lay_out(spec, [query, *(p for p in table if p.trainable)]).rows}
        assert (held["frozen", "fp32"].elements, held["frozen", "fp32"].shards) == (288 // ranks, ranks)
        assert (held["scales", "uint8"].elements, held["scales", "fp32"].elements) == (36, 256 + 1 + 1)
    spec = spec_of("full_shard", "int8", "fp32")
    query = next(p for p in parameter_table(spec) or () if p.name.endswith("q_proj.base_layer.weight"))
    held = {(row.line, row.dtype): row for row in lay_out(spec, [query]).rows}
    assert (held["frozen", "fp32"].elements, held["scales", "fp32"].elements) == (48 * 48 // 4 // 4, 48)


def test_swapped_bytes_are_those_of_the_parts() -> None:
    """Two ranks, fp32: a head of 2 MiB a rank is swapped and a norm stays; states move together, in units of 1,024 bytes."""
    spec = spec_of("zero3_nvme", compute="fp32", ranks=2)
    head, norm = Parameter("lm_head.weight", (2048, 512), ROOT), Parameter("model.norm.weight", (510,), ROOT)
    rows = {(row.line, row.home): row for row in lay_out(spec, [head, norm]).rows if row.line in ("weights", "master")}
    assert rows["weights", Home.NVME].elements == 1024 * 512
    assert rows["weights", Home.CPU].elements == 255
    assert rows["master", Home.NVME].elements == 1024 * 512 + 256
    assert rows["master", Home.CPU].elements == 0
    for limit in (1, 1024 * 512):  # the norm's sub-group is too small to move
        parted = replace(spec, strategy=replace(spec.strategy, buckets=replace(spec.strategy.buckets, sub_group=limit)))
        rows = {(row.line, row.home): row for row in lay_out(parted, [head, norm]).rows if row.line == "master"}
        assert (rows["master", Home.NVME].elements, rows["master", Home.CPU].elements) == (1024 * 512, 255)


def test_states_shrink_with_the_stage() -> None:
    """ZeRO's promise (arXiv:1910.02054, figure 1): 16 bytes a parameter, less with each stage."""
    held = []
    for name in ("zero0", "zero1", "zero2", "zero3"):
        spec = spec_of(name, ranks=4)
        table = parameter_table(spec)
        assert table is not None
        layout = lay_out(spec, table)
        held.append(layout.peak_bytes(Home.GPU))
    assert held[0] > held[1] > held[2]


def test_drift_names_line_dtype_home_and_both_figures() -> None:
    layout = Layout(1, 4, (Row("weights", "bf16", Home.GPU, 1000), Row("moments", "fp32", Home.CPU, 500, since=STEPPED)))
    check_census(layout, [Row("weights", "bf16", Home.GPU, 1000)], LOADED)
    with pytest.raises(LayoutDrift) as caught:
        check_census(layout, [Row("weights", "bf16", Home.GPU, 1024)], STEPPED)
    text = str(caught.value)
    assert "rank 1, weights (bf16, gpu): 1,024 elements live, 1,000 expected (48 B apart, after step)" in text
    assert "rank 1, moments (fp32, cpu): 0 elements live, 500 expected" in text


def test_transformers_trainer_takes_the_deepspeed_json(tmp_path: Path) -> None:
    """The printed JSON, unchanged, trains two steps in transformers' own Trainer."""
    spec = spec_of("zero2", compute="fp32", ranks=2)
    spec = replace(spec, batch=replace(spec.batch, micro=8), strategy=replace(spec.strategy, dp_shard=1))
    (tmp_path / "ds.json").write_text(json.dumps(lower(spec)))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("trainer_peer.py")), str(tmp_path)],
        text=True, capture_output=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29677", "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "TRAINED 2 DeepSpeedZeroOptimizer" in ended.stdout


def test_accelerate_takes_the_fsdp_config(tmp_path: Path) -> None:
    """`accelerate launch` with the printed file starts two FSDP2 processes that shard as asked."""
    spec = spec_of("full_shard", compute="fp32", ranks=2)
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(accelerate_config(spec)))
    accelerate = Path(sys.executable).with_name("accelerate")
    ended = subprocess.run(
        [str(accelerate), "launch", "--config_file", str(path), str(Path(__file__).with_name("accelerate_peer.py"))],
        text=True, capture_output=True, timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("SHARDED fsdp_version=2 reshard=True DTensor") == 2, ended.stdout[-2000:]


def test_every_case_of_the_contract_has_a_layout() -> None:
    for case in all_cases(2):
        spec = run_spec(case, 2)
        table = parameter_table(spec)
        assert table is not None
        assert lay_out(spec, table, 1).rest_bytes(Home.GPU) + lay_out(spec, table, 1).rest_bytes(Home.CPU) > 0
