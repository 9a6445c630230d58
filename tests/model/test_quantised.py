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
from orchestrator.model import formats
from orchestrator.model.quantised import QuantisedLinear, quantise_loaded
from orchestrator.spec import INT8, NF4, NF4_DOUBLE, scale_elements

FORMS = pytest.mark.parametrize("form", [NF4, NF4_DOUBLE])
EVERY = pytest.mark.parametrize("form", [NF4, NF4_DOUBLE, INT8])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_the_weights_of_bitsandbytes(dtype: torch.dtype) -> None:
    """LLM.int8's own codes and scales; no weight moves by more than half a code, and a row of zeros stays one."""
    import bitsandbytes  # noqa: F401  (registers its operations)

    values = normal(96, 41 * 4, dtype)
    values[7] = 0
    layer = layer_of(values, INT8)
    codes, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(values)
    kept = [row for row in range(96) if row != 7]
    ours = layer.weight.detach().view(torch.int8).view(96, -1)
    assert torch.equal(layer.absmax, scale.float()) and not ours[7].any()
    if dtype is torch.float32:  # bitsandbytes rounds in the dtype of the values, here in fp32 always
        assert torch.equal(ours[kept], codes[kept])
    again = layer.dequantised(layer.weight, torch.float32)
    assert ((again - values).abs() <= scale.float()[:, None] / 127 * 0.501).all()
    x = normal(5, 164, dtype).requires_grad_()
    product = layer(x)
    product.backward(torch.ones_like(product))
    weight = layer.dequantised(layer.weight, dtype)
    assert torch.equal(product, x @ weight.T) and torch.equal(x.grad, torch.ones_like(product) @ weight)


@FORMS
def test_rows_that_are_no_multiple_of_the_block_are_unpacked_right(form: str) -> None:
    values = normal(128, 352, torch.float32)
    layer = layer_of(values, form)
    again = layer.dequantised(layer.weight, torch.float32)
    # NF4's largest gap between neighbours is 0.304 (arXiv:2305.14314, appendix E), so no weight moves by more than half of it.
    bound = values.reshape(-1, 64).abs().amax(1, keepdim=True) * (0.152 if form == NF4 else 0.17)
    assert ((again - values).reshape(-1, 64).abs() <= bound).all()


@EVERY
def test_parts_of_a_packed_weight_are_those_of_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(96, 160, torch.bfloat16)
    whole = layer_of(values, form)
    scales = [scale.clone() for scale in whole.scales()]
    monkeypatch.setattr(formats, "RUN", 4096)
    size, flat = whole.weight.numel(), values.reshape(-1)
    cuts = [0, 1000, 1001, size, size]
    parts = [whole.pack(lambda start, stop: flat[start:stop], *run) for run in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts).view(torch.uint8), whole.weight.view(-1).view(torch.uint8))
    assert all(torch.equal(again, once) for again, once in zip(whole.scales(), scales, strict=True))


@EVERY
def test_what_it_holds_is_what_the_table_says(form: str) -> None:
    layer = layer_of(normal(96, 160, torch.bfloat16), form)
    held: dict[str, int] = {}
    for scale in layer.scales():
        name = {torch.float32: "fp32", torch.uint8: "uint8"}[scale.dtype]
        held[name] = held.get(name, 0) + scale.numel()
    assert held == scale_elements([layer.values])
    assert layer.weight.shape == (96 * 160 // (2 if form == INT8 else 4), 1)


@pytest.mark.parametrize("words", ["tuning.double_quant=true", "tuning.double_quant=false", "tuning.quant=int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_the_table_is_that_of_the_module(family: str, words: str) -> None:
    spec = compose([f"model.model_type={family}", "tuning=qlora", words, "tuning.targets=q_proj"])
    table = parameter_table(spec)
    assert table is not None
    assert set(models.table_of(models.build(spec, torch.device("meta")))) == set(table)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    formats.dynamic_values.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError) as caught:
        models.build(compose(["tuning=qlora"]), torch.device("meta"))
    models.build(compose(["tuning=qlora", "tuning.quant=int8"]), torch.device("meta"))  # needs nothing
    assert "need bitsandbytes" in str(caught.value) and "pip install bitsandbytes" in str(caught.value)
    assert len(caught.value.report().splitlines()) < 6
