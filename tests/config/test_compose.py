"""What compose fills in: nulls resolved, the model found, the machine at hand."""

import json
from pathlib import Path

import pytest

from orchestrator.config import build_cluster, compose, require_strategy
from orchestrator.config.schema import ClusterConf, FsdpConf, TensorConf, ZeroConf
from orchestrator.config.strategy import default_shard_size
from orchestrator.spec import Card, Cluster
from orchestrator.units import GIB

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 4096}  # fmt: skip


def folder(tmp_path: Path, **config: object) -> Path:
    """A model folder that holds nothing but its config.json."""
    path = tmp_path / "mine"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return path


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        ([], 3e-3),
        (["tuning=lora"], 3e-3),
        (["model=llama32_1b"], 2e-5),
        (["model=llama32_1b", "tuning=lora"], 2e-4),
        (["model=llama32_1b", "optimizer.lr=1e-3"], 1e-3),
    ],
)
def test_learning_rate_follows_what_is_trained(overrides, lr):
    assert compose(overrides).optimizer.lr == lr


@pytest.mark.parametrize(
    ("overrides", "ranks", "micro", "accumulation"),
    [
        ([], 1, 8, 2),
        (["zero=stage2"], 2, 8, 1),
        (["zero=stage2"], 4, 4, 1),
        (["zero=stage2", "batch.global_size=12"], 2, 6, 1),
        (["zero=stage2", "batch.global_size=22"], 2, 1, 11),
        (["zero=stage2", "model=llama32_1b"], 2, 1, 8),
        (["zero=stage2", "batch.micro=2"], 2, 2, 4),
    ],
)
def test_micro_batch_divides_the_share_of_a_rank(overrides, ranks, micro, accumulation):
    batch = compose(overrides, ranks=ranks).batch
    assert (batch.micro, batch.accumulation) == (micro, accumulation)


def test_sequences_fit_the_data_and_the_model(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    path = f"data.path={file}"
    assert compose([]).data.seq_len == 256
    assert compose([path]).data.seq_len == 1024, "the tiny model's limit"
    assert compose([path, "model=llama3_8b"]).data.seq_len == 2048
    assert compose([path, "data=local", "data.seq_len=64"]).data.seq_len == 64
    assert compose([path, "data=sample"]).data.path == str(file), "a path wins whatever the group"


def card(name: str, bf16: bool) -> Cluster:
    return Cluster("local", 1, 1, Card(name, GIB, 1.0, 1.0, 1.0, bf16))


def test_precision_follows_the_card():
    assert compose([]).precision.compute == "fp32"
    assert compose([], local=lambda ranks: card("cpu", True)).precision.compute == "fp32"
    assert compose([], local=lambda ranks: card("A10", True)).precision.compute == "bf16"
    assert compose([], local=lambda ranks: card("T4", False)).precision.compute == "fp16"
    assert compose(["cluster=1xt4", "zero=stage1"]).precision.compute == "fp16"
    assert compose(["cluster=8xv100_32", "zero=stage1"]).precision.compute == "fp16"
    assert compose(["precision=bf16"]).precision.compute == "bf16", "a CPU computes in bf16, if slowly"


def test_ranks_are_those_that_run_else_the_cards():
    assert compose(["cluster=4xa10", "zero=stage3"]).strategy.ranks == 4
    assert compose(["zero=stage3"], ranks=2).cluster.cards == 2
    assert compose(["zero=stage3", "cluster.cards_per_node=4"]).strategy.ranks == 4
    assert build_cluster(ClusterConf(), 3, None).cards == 3


def test_page_locking_needs_a_card():
    assert not compose(["zero=stage3", "offload=cpu"], ranks=2).strategy.pin_memory
    assert compose(["zero=stage3", "offload=cpu", "cluster=4xa10"]).strategy.pin_memory
    assert not compose(["zero=stage3", "offload=cpu", "cluster=4xa10", "offload.pin_memory=false"]).strategy.pin_memory
    assert not compose(["zero=stage3", "cluster=4xa10"]).strategy.pin_memory


def test_buckets_are_no_larger_than_the_model():
    tiny = compose(["zero=stage3"]).strategy.buckets
    assert (tiny.reduce, tiny.allgather, tiny.prefetch, tiny.persistence) == (1_311_872, 1_311_872, 1_311_872, 1280)
    large = compose(["zero=stage3", "model=llama3_8b"]).strategy.buckets
    assert (large.reduce, large.prefetch, large.persistence) == (50_000_000, 50_000_000, 40_960)
    keys = "reduce_bucket=7 allgather_bucket=8 prefetch_bucket=9 persistence_threshold=10 max_live_parameters=11"
    keys += " max_reuse_distance=12 sub_group_size=13 overlap_comm=false"
    given = compose(["zero=stage3", *(f"zero.{key}" for key in keys.split())]).strategy.buckets
    assert (given.reduce, given.allgather, given.prefetch, given.persistence) == (7, 8, 9, 10)
    assert (given.max_live, given.max_reuse, given.sub_group, given.overlap_comm) == (11, 12, 13, False)


@pytest.mark.parametrize(("ranks", "per_node", "size"), [(16, 8, 8), (8, 8, 4), (2, 2, 1), (1, 1, 1), (9, 9, 3), (3, 4, 1)])
def test_default_shard_group(ranks, per_node, size):
    assert default_shard_size(ranks, per_node) == size


def test_hybrid_shard_copies_across_groups():
    strategy = compose(["fsdp=hybrid_shard", "cluster=8xa100_80", "cluster.nodes=2"]).strategy
    assert (strategy.dp_replicate, strategy.dp_shard) == (2, 8)
    strategy = compose(["fsdp=hybrid_shard", "fsdp.shard_size=2"], ranks=4).strategy
    assert (strategy.dp_replicate, strategy.dp_shard) == (2, 2)


def test_lora_targets_in_every_way_of_writing():
    assert compose(["tuning=lora"]).tuning.targets[0] == "q_proj" and len(compose(["tuning=lora"]).tuning.targets) == 7
    assert compose(["tuning=lora", "tuning.targets=q_proj"]).tuning.targets == ("q_proj",)
    assert compose(["tuning=lora", "tuning.targets=[q_proj,v_proj,q_proj]"]).tuning.targets == ("q_proj", "v_proj")
    assert compose(["tuning=lora", "tuning.targets=all-linear", "tuning.rank=4"]).tuning.rank == 4
    assert compose([]).tuning.targets == ()


def test_a_published_model_needs_no_network_and_no_folder():
    model = compose(["model=llama3_8b"]).model
    assert (model.name, model.path) == ("llama3_8b", "meta-llama/Meta-Llama-3-8B")
    assert compose(["model=llama3_8b", "model.path=random"]).model.path is None
    assert compose(["model.path=Qwen/Qwen2.5-7B"]).model.shape == compose(["model=qwen25_7b"]).model.shape


def test_a_local_folder_is_read(tmp_path):
    path = folder(tmp_path, rope_theta=5e5, tie_word_embeddings=True)
    spec = compose([f"model.path={path}"])
    assert spec.model.name == "mine" and spec.model.path == str(path)
    shape = spec.model.shape
    assert (shape.head_dim, shape.num_key_value_heads, shape.tie_word_embeddings, shape.rope_theta) == (16, 4, True, 5e5)
    assert spec.optimizer.lr == 2e-5 and spec.batch.micro == 1, "no longer the tiny model"


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {}, {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16}),
        ("gemma", {"num_key_value_heads": 1}, {"tie_word_embeddings": True, "head_dim": 256}),
        ("qwen3", {"num_key_value_heads": 2}, {"head_dim": 128, "tie_word_embeddings": False}),
        ("mistral", {"num_key_value_heads": 2, "head_dim": None}, {"head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, {"rope_theta": 1e6}),
        ("llama", {"attention_bias": True}, {"attention_bias": True}),
    ],
)
def test_what_config_json_leaves_out_is_the_family_s(tmp_path, family, config, expected):
    shape = compose([f"model.path={folder(tmp_path, model_type=family, **config)}"]).model.shape
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_shapes_agree_with_transformers(tmp_path, family):
    """The defaults written down here are those of the library's own config classes."""
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    name = next(n for n in vars(module) if n.lower() == f"{family}config")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(
        json.dumps({"model_type": family, "vocab_size": 512, "hidden_size": 4096, "intermediate_size": 128,
                    "num_hidden_layers": 1, "num_attention_heads": 32})
    )  # fmt: skip
    shape = compose([f"model.path={tmp_path}/mine"]).model.shape
    config = getattr(module, name)(num_attention_heads=32, hidden_size=4096)
    assert shape.num_key_value_heads == config.num_key_value_heads
    assert shape.head_dim == (getattr(config, "head_dim", None) or 4096 // 32)
    assert shape.tie_word_embeddings == config.tie_word_embeddings
    assert shape.max_position_embeddings == config.max_position_embeddings
    assert shape.rope_theta == config.rope_parameters["rope_theta"]


def test_another_family_keeps_its_dimensions(tmp_path):
    path = tmp_path / "gpt2"
    path.mkdir()
    config = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    (path / "config.json").write_text(json.dumps(config))
    shape = compose([f"model.path={path}"]).model.shape
    assert not shape.known
    assert (shape.hidden_size, shape.num_hidden_layers, shape.intermediate_size, shape.max_position_embeddings) == (
        64,
        2,
        256,
        128,
    )
    (path / "config.json").write_text(json.dumps({"model_type": "strange"}))
    assert compose([f"model.path={path}"]).model.shape is None


def test_plain_is_for_one_process_unless_a_planner_chooses():
    assert require_strategy(ZeroConf(), FsdpConf(), TensorConf(), 1) == []
    assert len(require_strategy(ZeroConf(), FsdpConf(), TensorConf(), 2)) == 1
    assert compose([], ranks=2, strict=False).strategy.ranks == 2


def test_own_config_folder(tmp_path):
    import shutil

    from orchestrator.config.catalog import CONF_DIR

    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf" / "schedule" / "slow.yaml").write_text("# slow; nothing\nkind: constant\nwarmup: 7\n")
    assert compose(["schedule=slow"], config_dir=tmp_path / "conf").schedule.warmup == 7


def test_home_is_resolved_behind_a_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    spec = compose(["run.dir=~/runs/a", "data.path=~/a.json", f"model.path={folder(tmp_path)}"])
    assert (spec.run.dir, spec.data.path) == (f"{tmp_path}/runs/a", f"{tmp_path}/a.json")
    assert compose(["model.path=~/mine"]).model.path == f"{tmp_path}/mine"
    assert compose(["resume=~/mine"]).resume == f"{tmp_path}/mine"
    assert compose([]).resume == "none"
