"""What is exported is what transformers and PEFT load, to the bit."""

import json
import os
import subprocess
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.config import compose
from orchestrator.data.tokenizer import SAMPLE
from orchestrator.errors import CheckpointError
from orchestrator.train import checkpoint, export, reopen


def logits(model):
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


def test_a_full_export_loads_and_answers(small, execute):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = execute(small())
    model, info = AutoModelForCausalLM.from_pretrained(outcome.export, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.use_cache
    assert AutoTokenizer.from_pretrained(outcome.export).chat_template
    opened, tokenizer = reopen.open_model(outcome.export)
    assert torch.equal(logits(opened), logits(model)) and isinstance(reopen.answer(opened, tokenizer, "Hello", 3), str)


def test_generation_stops_where_answers_ended_in_training(small, execute, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = execute(small("run.steps=1")).export
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for settings in (model.config, model.generation_config):
        found = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
        assert found == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with torch.no_grad():  # a model that can say nothing but its end
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=20, do_sample=False).shape == (1, 3)


@pytest.mark.parametrize(("native", "ends"), [(True, [3, 7]), (False, 3)])
def test_the_ends_that_a_model_states_stay_with_its_own_tokenizer_alone(native, ends):
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    assert tokenizer.eos_token_id == 3
    source = export.Source(LlamaConfig(bos_token_id=9), GenerationConfig(eos_token_id=7), "LlamaForCausalLM", None)
    export.state_special_tokens(source, tokenizer, native=native)
    assert source.generation.eos_token_id == ends
    assert source.config.bos_token_id == (9 if native else tokenizer.bos_token_id)


def test_an_adapter_loads_on_its_base_and_equals_the_merged_model(small, execute):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    outcome = execute(small("tuning=lora", "export.merge=true"))
    adapted = AutoPeftModelForCausalLM.from_pretrained(outcome.export)
    merged = AutoModelForCausalLM.from_pretrained(outcome.export / "merged")
    base = AutoModelForCausalLM.from_pretrained(outcome.export / "base")
    assert torch.allclose(logits(adapted), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(adapted), logits(base), atol=1e-3)
    assert torch.equal(logits(adapted.merge_and_unload()), logits(merged))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opened, _ = reopen.open_model(outcome.export)
    assert torch.allclose(logits(opened), logits(merged), atol=1e-5)
    assert not [warning for warning in seen if warning.category is FutureWarning]


def test_a_model_from_a_folder_is_trained_and_its_adapter_names_the_folder(small, execute, tmp_path):
    first = execute(small("run.steps=1"))
    model = tmp_path / "model"
    first.export.rename(model)
    spec = compose(
        [f"model.path={model}", "tuning=lora", "run.steps=1", f"run.dir={tmp_path / 'second'}", "data.seq_len=64"], ranks=1
    )
    second = execute(spec)
    config = json.loads((second.export / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model) and not (second.export / "base").exists()


def test_an_export_that_changed_on_the_disk_is_noticed(small, execute):
    folder = execute(small("tuning=lora")).export
    reopen.check(folder)
    for file in (folder / "adapter_model.safetensors", folder / "base" / "model.safetensors"):
        whole = load_file(file)
        name = sorted(whole)[0]
        save_file(whole | {name: whole[name] + 1}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"of \d+ tensors 1 differ and 0 are missing \({name}\)"):
            reopen.check(folder)
        save_file(whole, file, metadata={"format": "pt"})


def test_large_models_are_split_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 100)
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}
    sums = export.write_model(tmp_path, tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200 and len(set(index["weight_map"].values())) == 3
    found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    export.compare(sums, found.items(), tmp_path)


def test_the_checksum_sees_dtype_shape_and_bits():
    zero = torch.zeros(4)
    others = [torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, 0.0, 0.0, -0.0])]
    assert len({export.checksum(tensor) for tensor in (zero, *others)}) == 4
    assert export.checksum(torch.zeros((), dtype=torch.bfloat16)) == export.checksum(torch.zeros((), dtype=torch.bfloat16))


def test_a_folder_without_an_export_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither a model nor an adapter"):
        reopen.open_model(tmp_path)


def test_no_room_for_the_export_is_told_and_nothing_of_it_is_left(small, execute, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        with pytest.raises(CheckpointError, match=r"export.*could not be written: .*No space left.* are free\n.*resume=auto"):
            execute(small("run.steps=1", f"run.dir={disk / 'run'}", "model.hidden_size=128", "model.head_dim=32"))
        assert not any("export" in p.name for p in (disk / "run").iterdir())
        assert (disk / "run" / "checkpoints").exists()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
