"""Every message about a config: its field, its numbers, its remedy."""

import copy
import json
import operator
import shutil
import time

import pytest

from orchestrator.config import compose
from orchestrator.config.catalog import CONF_DIR
from orchestrator.config.compose import compose_conf
from orchestrator.config.ranges import RULES, range_faults
from orchestrator.errors import ConfigError


def refuse(*overrides: str, ranks: int | None = 1, **arguments: object) -> str:
    """The report of a config that must be refused."""
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides), ranks=ranks, **arguments)
    report = caught.value.report()
    assert len(report.splitlines()) < 24, "one screen"
    return report


REFUSALS = [
    # misspelt
    ("zero=stag3", 1, ["zero has no choice stag3", "did you mean stage3?", "valid: none, stage0, stage1, stage2, stage3"]),
    ("zero=3", 1, ["zero has no choice 3", "did you mean stage3?"]),
    ("model=llama3_8", 1, ["did you mean llama3_8b?", "qwen_7b"]),
    ("batch.global_sise=12", 1, ["no key batch.global_sise", "did you mean batch.global_size?", "batch.micro"]),
    ("lr=1", 1, ["no key lr", "did you mean optimizer.lr?"]),
    ("optimzer.lr=1", 1, ["did you mean optimizer.lr?"]),  # codespell:ignore
    ("+foo.bar=1", 1, ["no key foo.bar", "valid groups and sections"]),
    ("run=runs/demo", 1, ["run is a section", "run.dir"]),
    ("zero=stage1,stage2", 1, ["several values for zero", "add -m"]),
    ("optimizer.betas=0.9,0.99", 1, ["several values for optimizer.betas", "optimizer.betas=[...]"]),
    ("zero", 1, ["this is no override", "key=value"]),
    # wrong types
    ("seed=abc", 1, ["'abc'", "Integer", "sample order"]),
    ("run.steps=1.5", 1, ["run.steps=1.5", "steps)"]),
    ("plan.on_misfit=wrn", 1, ["did you mean warn?", "refuse, warn, ignore"]),
    ("data.format=alpca", 1, ["did you mean alpaca?"]),
    ("cluster/card=a10", 1, ["cluster/card"]),
    ("optimizer.lr=-1", 1, ["optimizer.lr=-1.0 must be above 0"]),
    ("batch.global_size=0", 1, ["batch.global_size=0 must be at least 1"]),
    # strategy
    ("zero=stage3 fsdp=full_shard", 2, ["zero=stage3 is DeepSpeed and fsdp=full_shard is FSDP2", "zero=stage3 fsdp=none"]),
    ("offload=cpu", 1, ["offload=cpu needs an engine", "zero=stage3 or fsdp=full_shard"]),
    ("offload=optimizer", 1, ["offload=optimizer needs an engine", "zero=stage2"]),
    ("zero=stage1 offload=cpu", 2, ["under zero=stage1 they stay whole", "offload=optimizer"]),
    ("zero=stage2 offload=cpu", 2, ["under zero=stage2 they stay whole", "zero=stage3"]),
    ("zero=stage0 offload=cpu", 2, ["stage 0 shards nothing"]),
    ("zero=stage0 offload=optimizer", 2, ["stage 0 shards nothing", "zero=stage2 offload=optimizer"]),
    ("fsdp=full_shard offload=optimizer", 2, ["FSDP2 offloads parameters, gradients and optimizer together", "offload=cpu"]),
    ("zero=stage3 offload.parameters=true", 2, ["only together with the optimizer", "offload=cpu"]),
    ("zero=stage3 offload=cpu offload.pin_memory=true", 2, ["no accelerator"]),
    ("zero=stage2 offload=nvme", 2, ["offload=nvme with zero=stage2", "only DeepSpeed's stage 3", "zero=stage3 offload=nvme"]),
    ("fsdp=full_shard offload=nvme_optimizer", 2, ["zero=none fsdp=full_shard", "zero=stage3 offload=nvme_optimizer"]),
    ("zero=stage3 offload=nvme offload.optimizer_home=cpu", 2, ["only together with the optimizer", "offload=nvme_optimizer"]),
    ("zero=stage3 offload=nvme zero.prefetch_bucket=9 zero.max_reuse_distance=9", 2, ["neither fetched ahead", "leave it out"]),
    ("zero=stage3 offload=nvme offload.buffer_size=9", 2, ["9 elements", "largest weight has", "leave it out"]),
    ("zero=stage3 offload=nvme zero.persistence_threshold=9000000", 2, ["stay on the card", "would go to NVMe", "or less"]),
    ("zero=stage3 offload=nvme optimizer=lion", 2, ["with AdamW's alone", "optimizer=adamw, or offload=cpu"]),
    ("zero=stage3 offload=nvme tuning=qlora", 2, ["a packed base", "offload=cpu or offload=none"]),
    ("zero=stage3 offload=nvme checkpoint.background=true", 2, ["copies into host memory", "set it to false"]),
    ("zero=stage3 offload=cpu offload.path=/tmp offload.aio.threads=2", 2, ["would have no effect", "add offload=nvme"]),
    ("model=tiny", 2, ["2 ranks run, but zero=none and fsdp=none", "zero=stage2 or fsdp=full_shard"]),
    ("zero=stage3 cluster=4xa10", 2, ["2 processes run, but cluster=4xa10 has 4 cards", "--nproc-per-node=4"]),
    ("zero=stage3 cluster=4xa10", 1, ["1 process runs, but cluster=4xa10 has 4 cards"]),
    (
        "zero=stage3 tensor=2",
        2,
        ["divides whole parameters among all ranks", "zero=stage1 tensor=2, or fsdp=full_shard tensor=2"],
    ),
    ("zero=stage0 tensor=2", 2, ["divides nothing beside it", "use tensor=2 alone"]),
    ("tensor=2", 3, ["3 ranks cannot form groups of 2", "tensor.size=3, tensor=none, or start a multiple of 2"]),
    ("tensor=2", 1, ["1 rank cannot form groups of 2"]),
    ("tensor=4", 4, ["4 does not divide num_key_value_heads 2", "use tensor=2, tensor=none"]),
    ("tensor.size=3", 6, ["3 does not divide num_attention_heads 4, num_key_value_heads 2, vocab_size 2048"]),
    ("tensor=2 model.vocab_size=2049", 2, ["2 does not divide vocab_size 2049"]),
    ("tensor=4 model=llama3_8b cluster=2xa10 cluster.nodes=2", 4, ["reach across machines of 2 cards", "use tensor=2"]),
    (
        "tensor=2 tuning=qlora",
        2,
        ["packed weights have no rows and columns", "use tuning=lora, or fsdp=full_shard tensor=none"],
    ),
    ("tensor=2 tuning=lora tuning.dora=true", 2, ["parts of rows there", "fsdp=full_shard tensor=none"]),
    ("zero=stage3 offload=nvme tuning=lora tuning.dora=true", 2, ["has not been tried", "use offload=cpu"]),
    ("compile=block zero=stage3", 2, ["by hooks inside the block", "use zero=stage2, or compile=none"]),
    ("compile=block tensor=2", 2, ["sums over the ranks inside the block", "use tensor=none"]),
    ("compile=block recompute=selective", 1, ["gone when it is compiled", "use recompute=full"]),
    ("compile=block tuning=qlora", 1, ["a packed base", "use tuning=lora"]),
    ("compile=block tuning=lora tuning.dora=true", 1, ["has not been tried compiled"]),
    ("tensor=2 optimizer=muon", 2, ["tensor=2 with optimizer=muon", "use optimizer=adamw, adamw_bf16, lion, or tensor=none"]),
    ("pipeline=2 fsdp=full_shard", 2, ["pipeline=2 is not supported", "use fsdp=full_shard, or tensor=2"]),
    ("fsdp=hybrid_shard fsdp.shard_size=3", 4, ["shard groups of 3 ranks do not divide 4 ranks", "1, 2, 4"]),
    # batch
    ("zero=stage2 batch.global_size=10", 4, ["10 samples cannot be divided among 4 data-parallel ranks", "8 or 12"]),
    ("zero=stage2 batch.global_size=2", 4, ["2 samples", "set batch.global_size to 4"]),
    ("zero=stage2 batch.micro=3", 2, ["2 data-parallel ranks x batch.micro 3 = 6", "12 or 18", "another batch.micro"]),
    # precision
    ("precision=fp16 zero=stage0", 2, ["does not clip gradients", "zero=stage1"]),
    ("precision=bf16 cluster=1xt4", 1, ["the card T4 has no bf16", "precision=fp16"]),
    # model and tuning
    ("data.seq_len=2048", 1, ["2048 tokens, but the model was made for at most 1024", "data.seq_len=1024"]),
    ("tuning=lora tuning.targets=[q_proj,c_attn]", 1, ["llama has no linear layer c_attn", "q_proj, k_proj"]),
    ("tuning=lora tuning.targets=5", 1, ["no list of layer names"]),
    ("tuning=lora tuning.targets=[]", 1, ["no list of layer names"]),
    ("tuning=lora tuning.targets=[all-linear,q_proj]", 1, ["cannot be joined"]),
    ("model.num_key_value_heads=3", 1, ["4 query heads cannot share 3 key and value heads", "1, 2, 4"]),
    ("model.model_type=gpt2", 1, ["family 'gpt2' cannot be made from dimensions", "llama"]),
    ("model=llama3_8b model.num_hidden_layers=4", 1, ["decide the dimensions", "model.path=random"]),
    ("model.path=/nowhere/model", 1, ["no folder /nowhere/model", "config.json"]),
    ("export.merge=true", 1, ["no adapters to fold in", "tuning=lora"]),
    # keys that nothing reads
    ("tuning=lora tuning.double_quant=false", 1, ["tuning.double_quant: would have no effect", "add tuning=qlora"]),
    ("tuning=qlora tuning.quant=fp4", 1, ["fp4", "nf4"]),
    ("tuning=qlora tuning.quant=int8 tuning.double_quant=true", 1, ["one scale to a row", "tuning.quant=nf4"]),
    ("tuning=qlora tuning.targets=[c_attn]", 1, ["llama has no linear layer c_attn"]),
    (
        "tuning=qlora model.hidden_size=36 model.head_dim=6 model.num_attention_heads=6 model.num_key_value_heads=6",
        1,
        ["self_attn.q_proj.weight has 36 × 36 weights", "blocks of 64", "use tuning=lora"],
    ),
    ("tuning.rank=4", 1, ["tuning.rank: would have no effect", "add tuning=lora"]),
    ("zero.overlap_comm=false", 1, ["zero.overlap_comm: would have no effect", "zero=stage3"]),
    ("fsdp=full_shard fsdp.shard_size=1", 1, ["would have no effect", "fsdp=hybrid_shard"]),
    ("zero=stage3 offload.pin_memory=false", 1, ["would have no effect", "offload=cpu"]),
    # optimizer
    ("optimizer=muon zero=stage0", 2, ["zero=stage0: it orthogonalises whole matrices", "fsdp=full_shard"]),
    ("optimizer=adafactor zero=stage2", 2, ["sums over the rows and columns of whole matrices", "optimizer=adamw_8bit"]),
    ("optimizer=paged_adamw_8bit", 1, ["there is no card", "optimizer=adamw_8bit"]),
    ("optimizer=paged_adamw_8bit cluster=1xa10 zero=stage2 offload=optimizer", 1, ["in host memory anyway"]),
    ("optimizer.momentum=0.9", 1, ["optimizer.momentum", "only Muon", "optimizer=muon"]),
    ("optimizer.update_clip=2 optimizer=lion", 1, ["only Adafactor", "optimizer=adafactor"]),
    ("optimizer=adafactor optimizer.betas=[0.9,0.99]", 1, ["Adafactor has no betas", "optimizer.forgetting"]),
    ("optimizer=lion optimizer.eps=1e-6", 1, ["optimizer.eps", "divide by nothing"]),
    ("zero=stage1 zero.gradients=fp32 precision=bf16", 2, ["DeepSpeed adds up in bf16 there", "zero=stage2 or stage3"]),
    ("zero.gradients=fp32", 1, ["zero.gradients", "zero=none runs no DeepSpeed"]),
    ("health.on_nonfinite=stop health.nonfinite_limit=3", 1, ["health.nonfinite_limit", "ends the run at the first"]),
    ("health.on_spike=rollback", 1, ["health.on_spike", "checkpoint.every=0 saves at the end alone", "checkpoint.every=100"]),
    ("health.on_oom=halve batch.micro=1", 1, ["health.on_oom", "batch.micro=1 cannot be halved", "recompute=full"]),
    ("zero=stage3 offload=nvme health.on_oom=halve", 2, ["health.on_oom", "a process that is replaced", "offload=cpu"]),
    ("health.spike_limit=2", 1, ["health.spike_limit", "looks for no spike", "health.on_spike=rollback"]),
    # data and resume
    ("data=local", 1, ["data=local needs a file", "data.path=FILE"]),
    ("data.path=/nowhere.json", 1, ["no file /nowhere.json", ".jsonl"]),
    ("data.path=/tmp data.sources=[{path:/tmp}]", 1, ["/tmp and 1 sources are given", "name it as one of data.sources"]),
    ("data.sources=[{path:/tmp,weight:0}]", 1, ["weight 0 of /tmp would show none of its rows", "give a weight above 0"]),
    ("data.sources=[{weight:2}]", 1, ["data.sources[0].path: the source has no path"]),
    ("data.max_rows=0", 1, ["data.max_rows=0 must be at least 1"]),
    ("data.tokenizer=/nowhere", 1, ["data.tokenizer: there is no folder /nowhere"]),
    ("resume=last", 1, ["'last' is neither none nor auto"]),
    ("eval.every=5", 1, ["data.eval_fraction=0 holds out no samples", "data.eval_fraction=0.05"]),
]


@pytest.mark.parametrize(("overrides", "ranks", "parts"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_refused_with_field_numbers_and_remedy(overrides, ranks, parts):
    report = refuse(*overrides.split(), ranks=ranks)
    for part in parts:
        assert part in report


OUT_OF_RANGE = [
    ("run.steps", 0, "must be at least 1"),
    ("run.epochs", 0, "must be at least 1"),
    ("run.timeout", 9, "must be at least 10 seconds, or 0 for none"),
    ("seed", -1, "must be from 0 to 4294967295"),
    ("batch.global_size", 0, "must be at least 1"),
    ("batch.micro", 0, "must be at least 1"),
    ("data.seq_len", 1, "must be from 2 (a token is predicted from the one before)"),
    ("data.seq_len", 10**9, "must be from 2 (a token is predicted from the one before) to 100,000,000"),
    ("data.max_rows", 0, "must be at least 1"),
    ("data.workers", -1, "must be from 0 (this process alone) to 1024"),
    ("data.workers", 1025, "must be from 0 (this process alone) to 1024"),
    ("data.eval_fraction", 1.0, "must be at least 0 and below 1"),
    ("tuning.rank", 0, "must be at least 1"),
    ("tuning.alpha", 0, "must be at least 1"),
    ("tuning.dropout", 1.0, "must be at least 0 and below 1"),
    ("optimizer.lr", 0.0, "must be above 0"),
    ("optimizer.eps", 0.0, "must be above 0"),
    ("optimizer.weight_decay", -0.1, "must be at least 0"),
    ("optimizer.clip", -1.0, "must be at least 0 (0: no clipping)"),
    ("optimizer.betas", [0.9], "must be two numbers"),
    ("optimizer.betas", [0.9, 1.0], "must be two numbers"),
    ("health.nonfinite_limit", 0, "must be at least 1"),
    ("health.spike_window", 7, "must be at least 8"),
    ("health.spike_deviations", 0.0, "must be above 0"),
    ("health.spike_limit", 0, "must be at least 1"),
    ("optimizer.momentum", 1.0, "must be at least 0 and below 1"),
    ("optimizer.forgetting", 0.0, "must be above 0"),
    ("optimizer.update_clip", 0.0, "must be above 0"),
    ("schedule.warmup", -1.0, "must be at least 0"),
    ("schedule.warmup", 1.5, "must be below 1 (a share) or a whole number of steps"),
    ("schedule.min_ratio", 2.0, "must be from 0 to 1"),
    ("zero.stage", 4, "must be 0, 1, 2 or 3"),
    ("zero.reduce_bucket", 0, "must be at least 1 element"),
    ("zero.allgather_bucket", 0, "must be at least 1 element"),
    ("zero.prefetch_bucket", -1, "must be at least 0 elements"),
    ("zero.persistence_threshold", -1, "must be at least 0 elements"),
    ("zero.max_live_parameters", -1, "must be at least 0 elements"),
    ("zero.max_reuse_distance", -1, "must be at least 0 elements"),
    ("zero.sub_group_size", 0, "must be at least 1 element"),
    ("offload.buffer_count", 0, "must be at least 1"),
    ("offload.buffer_size", 0, "must be at least 1 element"),
    ("offload.aio.block_size", 5000, "must be a multiple of 4096: the disk is read past the kernel's cache"),
    ("offload.aio.queue_depth", 0, "must be at least 1"),
    ("offload.aio.threads", 0, "must be at least 1"),
    ("fsdp.shard_size", 0, "must be at least 1"),
    ("tensor.size", 0, "must be at least 1"),
    ("pipeline.stages", 0, "must be at least 1"),
    ("checkpoint.every", -1, "must be at least 0 (0: only at the end)"),
    ("checkpoint.keep", 0, "must be at least 1: the run needs its last checkpoint"),
    ("recompute.every", 1, "must be at least 2: with 1 it is recompute=full"),
    ("loss.chunk", 0, "must be at least 1"),
    ("eval.every", -1, "must be at least 0 (0: none)"),
    ("logging.every", 0, "must be at least 1"),
    *((f"model.{name}", value, "must be at least 1 and at most ") for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads") for value in (0, 10**8)),
    *((f"model.{name}", 0, "must be above 0") for name in ("max_position_embeddings", "rope_theta")),
    ("model.head_dim", 3, "must be from 2 to 65,536 and even"),
    ("cluster.nodes", 0, "must be at least 1"),
    ("cluster.cards_per_node", -1, "must be from 0 to 64"),
    *((f"cluster.card.{name}", -1.0, "must be at least 0") for name in (
        "memory_mib", "half_tflops", "memory_gb_per_s", "link_gb_per_s")),
    ("cluster.host_gib", -1.0, "must be at least 0"),
    ("cluster.nvme_gib", -1.0, "must be at least 0"),
    ("cluster.nvme_gb_per_s", -1.0, "must be at least 0"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """The default config, from which one value at a time is moved."""
    return compose_conf([])


@pytest.mark.parametrize(("path", "value", "rule"), OUT_OF_RANGE)
def test_single_values_have_ranges(tiny, path, value, rule):
    conf = copy.deepcopy(tiny)
    assert range_faults(conf) == []
    section, _, leaf = path.rpartition(".")
    setattr(operator.attrgetter(section)(conf) if section else conf, leaf, value)
    (fault,) = range_faults(conf)
    assert fault.field == path and f"{path}={value} {rule}" in fault.problem


def test_every_rule_has_its_row():
    assert {path for path, _, _ in RULES} == {path for path, _, _ in OUT_OF_RANGE}


def test_all_faults_are_reported_together():
    report = refuse("zero=stag3", "batch.mikr=1", "seed=x", "optimizer.lr=-1", "data.path=/nowhere.json", "model.path=/nowhere")
    assert "6 faults" in report
    report = refuse("zero=stage1", "offload=cpu", "batch.global_size=9", "data.seq_len=4096", "optimizer.lr=-1", ranks=2)
    assert "4 faults" in report


def test_model_folder_that_is_none(tmp_path):
    report = refuse(f"model.path={tmp_path}")
    assert "has no config.json (it holds nothing)" in report and "save_pretrained" in report
    (tmp_path / "config.json").write_text("{")
    assert "is not readable JSON" in refuse(f"model.path={tmp_path}")
    assert "is a file" in refuse(f"model.path={tmp_path}/config.json")
    (tmp_path / "config.json").write_text("[]")
    assert "holds list, not an object" in refuse(f"model.path={tmp_path}")


def test_model_that_brings_code(tmp_path):
    config = {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling.Homemade"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = refuse(f"model.path={tmp_path}")
    assert "needs Python code of its own" in report and "model.trust_remote_code=true" in report
    assert compose([f"model.path={tmp_path}", "model.trust_remote_code=true"]).model.trust_remote_code
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    assert compose([f"model.path={tmp_path}"]), "transformers has this family, so the code is not needed"


def test_unknown_linears_of_another_family_must_be_named(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "the linear layers of the family 'gpt2' are not known" in refuse(f"model.path={tmp_path}", "tuning=lora")
    spec = compose([f"model.path={tmp_path}", "tuning=lora", "tuning.targets=[c_attn]"])
    assert spec.tuning.targets == ("c_attn",)


def test_hub_model_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    report = refuse("model.path=nobody/nothing")
    assert "cannot be had from the hub" in report and "give a local folder" in report
    assert time.monotonic() - started < 10


def test_misspelt_key_in_a_file_names_the_file(tmp_path):
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf" / "zero" / "odd.yaml").write_text("# odd; odd\nstage: 1\nreduce_buckt: 5\n")
    report = refuse("zero=odd", config_dir=tmp_path / "conf")
    assert "conf/zero/odd.yaml" in report and "did you mean zero.reduce_bucket?" in report
    (tmp_path / "conf" / "zero" / "odd.yaml").write_text("# odd; odd\nstage: many\n")
    report = refuse("zero=odd", config_dir=tmp_path / "conf")
    assert "conf/zero/odd.yaml" in report and "many" in report


def test_no_fault_is_thrown_raw_by_the_library():
    assert "run.dir" in refuse("run.dir=${nothing}") or "nothing" in refuse("run.dir=${nothing}")
