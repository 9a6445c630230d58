"""The head that gives the loss: equal to whole logits, without any tensor of their size, and only where that is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.cases import SHAPE, Case, run_spec

from orchestrator import model as models
from orchestrator.config import compose
from orchestrator.data.batch import IGNORED, MicroBatch
from orchestrator.engine.materialize import materialize, without_storage
from orchestrator.errors import ConfigError
from orchestrator.model.head import LossHead
from orchestrator.planner.tracer import Tracer
from orchestrator.spec import KNOWN_FAMILIES, Loss, RunSpec, Tuning, from_json, to_json

WORDS, LENGTH = SHAPE.vocab_size, 24


def spec_of(loss: Loss, family: str = "llama", tied: bool = False) -> RunSpec:
    spec = run_spec(Case("zero1", "full", "fp32", 1), 2)
    shape = replace(SHAPE, model_type=family, tie_word_embeddings=tied)
    return replace(spec, model=replace(spec.model, shape=shape), loss=loss)


def built(spec: RunSpec, *, frozen: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    module = models.build(spec, without_storage())
    materialize(module, torch.device("cpu"))
    weights = models.open_weights(spec, models.table_of(module))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights.read(name, 0, parameter.numel()).view(parameter.shape))
    module.get_output_embeddings().weight.requires_grad_(not frozen)
    return module.to(dtype)


def batch(learned: float = 0.6) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, WORDS, (3, LENGTH), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < learned, ids, IGNORED)
    labels[1] = IGNORED
    return MicroBatch(ids, labels)


def loss_and_gradients(module: torch.nn.Module, given: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = models.loss_sum(module, given)
    (loss / 7).backward()
    return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [7, 1000], ids=["slices", "at once"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_equal_those_of_whole_logits(chunk: int, frozen: bool, tied: bool) -> None:
    expected, wanted = loss_and_gradients(built(spec_of(Loss("plain"), tied=tied), frozen=frozen), batch())
    found, made = loss_and_gradients(built(spec_of(Loss("chunked", chunk), tied=tied), frozen=frozen), batch())
    assert found == pytest.approx(expected, rel=1e-6)
    assert made.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", KNOWN_FAMILIES)
def test_every_known_family_gives_the_product_of_its_head_as_it_is(family: str) -> None:
    expected, _ = loss_and_gradients(built(spec_of(Loss("plain"), family)), batch())
    found, _ = loss_and_gradients(built(spec_of(Loss("chunked", 7), family)), batch())
    assert found == pytest.approx(expected, rel=1e-6)


def test_probabilities_below_the_smallest_number_of_fp16_still_push_their_words_down() -> None:
    """2e-8 is zero in fp16; raised by a power of two before it is rounded, it is not."""
    head = torch.nn.Linear(1, 2, bias=False, dtype=torch.float16)
    head.weight.data = torch.tensor([[0.0], [-17.7]], dtype=torch.float16)
    head.__class__, head.loss = LossHead, Loss("chunked", 4)
    hidden = torch.ones(1, 2, 1, dtype=torch.float16, requires_grad=True)
    with models.learning(models.target_of(torch.tensor([[0, 0]]))):
        loss = head(hidden)
    (loss * 65536).backward()
    assert head.weight.grad is not None
    assert float(head.weight.grad[1]) == pytest.approx(65536 * 2.05e-8, rel=0.05)


@pytest.mark.parametrize("learned", [0.0, 1.0])
def test_a_micro_batch_without_labels_has_a_loss_of_zero_and_gradients_of_zero(learned: float) -> None:
    given = batch(learned)
    given.labels[:] = IGNORED
    loss, gradients = loss_and_gradients(built(spec_of(Loss("chunked", 7))), given)
    assert loss == 0.0
    assert gradients and all(not gradient.any() for gradient in gradients.values())


def peak(loss: Loss, learn: bool, length: int, words: int) -> int:
    """The most bytes that a forward of three samples of `length` tokens holds at once, weights apart."""
    spec = spec_of(loss)
    assert spec.model.shape is not None
    module = built(replace(spec, model=replace(spec.model, shape=replace(spec.model.shape, vocab_size=words))))
    ids = torch.arange(3 * length).view(3, length) % words
    tracer = Tracer({"cpu": "gpu"})
    with tracer, torch.set_grad_enabled(learn):
        tracer.enter_phase("forward")
        models.loss_sum(module, MicroBatch(ids, ids.clone()))
    return tracer.trace().peak()


@pytest.mark.parametrize("learn", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["chunked", "plain"])
def test_the_peak_does_not_grow_with_words_times_tokens(kind: str, learn: bool) -> None:
    """What is left of the peak when the growth with words alone and with tokens alone is taken away."""
    few, many, small, large = 16, 64, 1024, 4096
    more, less = [peak(Loss(kind, 7), learn, many, words) - peak(Loss(kind, 7), learn, few, words) for words in (large, small)]
    logits = 3 * (many - few) * (large - small) * 4
    if kind == "plain":
        assert more - less >= logits
    else:
        assert more - less < 0.01 * logits


def test_the_target_follows_the_hidden_states() -> None:
    """FSDP2 with offload=cpu rests its weights on the host, so a parameter's device does not tell where the head computes."""
    head = torch.nn.Linear(8, 16, bias=False, device="meta")
    head.__class__, head.loss = LossHead, Loss("chunked", 4)
    with models.learning(models.target_of(torch.zeros(1, 9, dtype=torch.int64))):
        loss = head(torch.ones(1, 9, 8, device="meta", requires_grad=True))
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad.device.type == "meta"


def test_without_a_target_the_head_gives_logits() -> None:
    module, given = built(spec_of(Loss("chunked", 7))), batch()
    with torch.no_grad():
        assert module(input_ids=given.input_ids).logits.shape == (3, LENGTH, WORDS)


def test_a_spec_from_before_the_choice_made_whole_logits() -> None:
    old = to_json(compose(["model=tiny"]))
    del old["loss"]
    assert from_json(RunSpec, old).loss == Loss("plain")


def test_a_trained_copy_of_the_head_beside_adapters_gives_the_loss_too() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    losses = []
    for loss in (Loss("plain"), Loss("chunked", 7)):
        torch.manual_seed(0)
        module = get_peft_model(built(spec_of(loss)), lora)
        losses.append(loss_and_gradients(module, batch()))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    head = next(name for name in losses[0][1] if "lm_head" in name)
    torch.testing.assert_close(losses[1][1][head], losses[0][1][head], rtol=1e-5, atol=1e-6)


def test_the_loss_is_chunked_where_nothing_is_said() -> None:
    assert compose(["model=tiny"]).loss == Loss("chunked", 512)
    assert compose(["model=tiny", "loss.kind=plain"]).loss.kind == "plain"
    assert compose(["model=tiny", "loss.chunk=64", "tuning=lora"]).loss == Loss("chunked", 64)
    assert compose(["model=tiny"]).tuning == Tuning("full")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.kind=liger"], "Liger's kernel runs on NVIDIA cards, and this machine has none"),
        (["loss.kind=plain", "loss.chunk=64"], "only the chunked loss has chunks"),
        (["loss.chunk=0"], "loss.chunk=0 must be at least 1"),
        (["loss.kind=fused"], "loss.kind cannot be fused"),
    ],
    ids=" ".join,
)
def test_what_cannot_work_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["model=tiny", *words])
    assert said in str(caught.value)


def test_a_family_that_may_scale_its_logits_keeps_them(tmp_path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(
        "gemma2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64,
        intermediate_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert compose([f"model.path={tmp_path}"]).loss.kind == "plain"
    with pytest.raises(ConfigError, match="what gemma2 does to its logits is not known here"):
        compose([f"model.path={tmp_path}", "loss.kind=chunked"])
