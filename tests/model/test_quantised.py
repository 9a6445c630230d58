"""Layers in 4 bits: what they hold and compute, against bitsandbytes' own."""

import itertools
import sys

import pytest
import torch
from torch import nn

from orchestrator import model as models
from orchestrator.config import compose
from orchestrator.errors import ModelError
from orchestrator.layout import parameter_table
from orchestrator.model import quantised
from orchestrator.model.quantised import QuantisedLinear, quantise_loaded
from orchestrator.spec import NF4, NF4_DOUBLE, scale_elements

FORMS = pytest.mark.parametrize("form", [NF4, NF4_DOUBLE])


def layer_of(values: torch.Tensor, form: str) -> QuantisedLinear:
    model = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=values.dtype))
    with torch.no_grad():
        model[0].weight.copy_(values)
    quantise_loaded(model, lambda name: True, form)
    assert isinstance(model[0], QuantisedLinear)
    return model[0]


def normal(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns).normal_(0, 0.05, generator=torch.Generator().manual_seed(3)).to(dtype)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_bitsandbytes_own_layer_does(form: str, dtype: torch.dtype) -> None:
    import bitsandbytes

    values = normal(192, 128, dtype)
    double = form == NF4_DOUBLE
    theirs = bitsandbytes.nn.Linear4bit(
        128, 192, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type="nf4", quant_storage=dtype
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        values.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4", quant_storage=dtype, module=theirs
    )
    theirs, ours = theirs.to("cpu"), layer_of(values, form)
    assert torch.equal(ours.weight.view(torch.uint8), theirs.weight.data.view(torch.uint8))
    results = []
    for layer in (theirs, ours):
        x = normal(5, 128, dtype).requires_grad_()
        product = layer(x)
        product.backward(torch.ones_like(product))
        results.append((product, x.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)


@FORMS
def test_rows_that_are_no_multiple_of_the_block_are_unpacked_right(form: str) -> None:
    values = normal(128, 352, torch.float32)
    layer = layer_of(values, form)
    again = layer.dequantised(layer.weight, torch.float32)
    # NF4's largest gap between neighbours is 0.304 (arXiv:2305.14314, appendix E), so no weight moves by more than half of it.
    bound = values.reshape(-1, 64).abs().amax(1, keepdim=True) * (0.152 if form == NF4 else 0.17)
    assert ((again - values).reshape(-1, 64).abs() <= bound).all()


@FORMS
def test_parts_of_a_packed_weight_are_those_of_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(96, 160, torch.bfloat16)
    whole = layer_of(values, form)
    scales = [scale.clone() for scale in whole.scales()]
    monkeypatch.setattr(quantised, "RUN", 4096)
    size, flat = whole.weight.numel(), values.reshape(-1)
    cuts = [0, 1000, 1001, size, size]
    parts = [whole.pack(lambda start, stop: flat[start:stop], *run) for run in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts).view(torch.uint8), whole.weight.view(-1).view(torch.uint8))
    assert all(torch.equal(again, once) for again, once in zip(whole.scales(), scales, strict=True))


@FORMS
def test_what_it_holds_is_what_the_table_says(form: str) -> None:
    layer = layer_of(normal(96, 160, torch.bfloat16), form)
    held: dict[str, int] = {}
    for scale in layer.scales():
        name = {torch.float32: "fp32", torch.uint8: "uint8"}[scale.dtype]
        held[name] = held.get(name, 0) + scale.numel()
    assert held == scale_elements([layer.values])
    assert layer.weight.shape == (96 * 160 // 4, 1)


@pytest.mark.parametrize("double", ["true", "false"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_the_table_is_that_of_the_module(family: str, double: str) -> None:
    spec = compose([f"model.model_type={family}", "tuning=qlora", f"tuning.double_quant={double}", "tuning.targets=q_proj"])
    table = parameter_table(spec)
    assert table is not None
    assert set(models.table_of(models.build(spec, torch.device("meta")))) == set(table)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised.dynamic_values.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError) as caught:
        models.build(compose(["tuning=qlora"]), torch.device("meta"))
    assert "need bitsandbytes" in str(caught.value) and "pip install bitsandbytes" in str(caught.value)
    assert len(caught.value.report().splitlines()) < 6
