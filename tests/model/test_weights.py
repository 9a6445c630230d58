"""Initial values: slices of real safetensors, random values that depend on the name alone, and folders that cannot serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract.cases import Case, run_spec

from orchestrator import model as models
from orchestrator.engine.materialize import without_storage
from orchestrator.errors import ModelError
from orchestrator.model.weights import InitialWeights
from orchestrator.spec import RunSpec

ROOT = Path(__file__).parents[2]


def spec_at(path: Path | None, tuning: str = "full") -> RunSpec:
    spec = run_spec(Case("zero1", tuning, "fp32", 1), 2)
    return replace(spec, model=replace(spec.model, path=str(path) if path else None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, as the hub serves them."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(models.architecture(spec_at(None))).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def weights_of(spec: RunSpec) -> tuple[object, InitialWeights]:
    table = models.table_of(models.build(spec, without_storage()))
    return table, models.open_weights(spec, table)


def test_any_slice_of_any_tensor(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    _table, weights = weights_of(spec_at(folder))
    for name, tensor in expected.items():
        flat = tensor.detach().reshape(-1)
        for start, stop in ((0, flat.numel()), (5, flat.numel() - 7), (flat.numel() // 2, flat.numel() // 2 + 1)):
            assert torch.equal(weights.read(name, start, stop), flat[start:stop]), name
        if tensor.dim() == 2:
            width = tensor.shape[1]
            some = weights.read(name, 2 * width, 7 * width, (3, width - 1))
            assert torch.equal(some, tensor.detach()[2:7, 3 : width - 1].reshape(-1)), name


def test_adapters_are_drawn_and_the_base_is_read(folder: Path) -> None:
    spec = spec_at(folder, "lora")
    _table, weights = weights_of(spec)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    base = weights.read(f"{prefix}.base_layer.weight", 0, 10)
    assert torch.equal(base, weights_of(spec_at(folder))[1].read("model.layers.0.self_attn.q_proj.weight", 0, 10))
    assert weights.read(f"{prefix}.lora_B.default.weight", 0, 50).abs().max() == 0
    drawn = weights.read(f"{prefix}.lora_A.default.weight", 0, 4 * 48)
    assert 0 < drawn.abs().max() <= 48**-0.5
    assert torch.equal(drawn[10:20], weights_of(spec)[1].read(f"{prefix}.lora_A.default.weight", 10, 20))
    columns = weights.read(f"{prefix}.lora_A.default.weight", 48, 3 * 48, (40, 48))
    assert torch.equal(columns, drawn.view(4, 48)[1:3, 40:].reshape(-1))
    other = weights_of(replace(spec, seed=spec.seed + 1))[1]
    assert not torch.equal(drawn, other.read(f"{prefix}.lora_A.default.weight", 0, 4 * 48))


def test_random_values_depend_on_seed_and_name_alone() -> None:
    _, weights = weights_of(spec_at(None))
    name = "model.layers.1.mlp.up_proj.weight"
    whole = weights.read(name, 0, 80 * 48)
    assert torch.equal(weights_of(spec_at(None))[1].read(name, 100, 200), whole[100:200])
    assert float(whole.std()) == pytest.approx(48**-0.5, rel=0.05)
    assert weights.read("model.norm.weight", 0, 48).unique().tolist() == [1.0]


def test_tensors_that_do_not_belong_to_the_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    for file in folder.iterdir():
        (tmp_path / "wrong" / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config | {"vocab_size": 300, "num_hidden_layers": 3}))
    with pytest.raises(ModelError) as caught:
        weights_of(spec_at(tmp_path / "wrong"))
    assert "embed_tokens.weight has shape [257, 48], the config says [300, 48]" in str(caught.value)
    assert "layers.2" in str(caught.value) and "and" in str(caught.value) and "more" in str(caught.value)


def test_pickled_weights_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ModelError, match=r"(?s)holds no \*.safetensors.*pickled weights"):
        weights_of(spec_at(tmp_path))


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match="damaged weights"):
        weights_of(spec_at(tmp_path))


def test_a_missing_file_of_the_index_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gone = sorted(tmp_path.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        weights_of(spec_at(tmp_path))


def test_a_checkpoint_without_the_head_is_matched_by_its_names(folder: Path, tmp_path: Path) -> None:
    """Weights saved from the headless model lack the "model." prefix."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    _, weights = weights_of(spec_at(tmp_path))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights.read(name, 3, 60), tensors[name].reshape(-1)[3:60])


@pytest.mark.parametrize("way", ["fsdp=full_shard bf16", "zero=stage3"])
def test_no_rank_holds_more_than_its_share(way: str, tmp_path: Path) -> None:
    """The benchmark itself on two ranks: a model of 304 MiB, peak private memory within a tenth of each rank's half."""
    output = tmp_path / "loading.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/loading.py", "--ranks", "2", "--ways", way, "--json", str(output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(output.read_text())
    assert found["model_bytes"] > 250 * 2**20
    assert found["results"][way]["ratio_to_share"] <= 1.1
