"""Every recipe fits the card that it names with the memory that its first line states, and the user's words win over it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
from recipes import heads, second_runs, ways_out

from orchestrator import compare, plan
from orchestrator.config import compose
from orchestrator.config.catalog import groups
from orchestrator.planner.plan import Plan
from orchestrator.planner.predict import by_layout
from orchestrator.units import GIB

RECIPES = {choice.name: choice.summary for choice in groups()["recipe"] if choice.name != "none"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_card_as_its_first_line_says(name: str) -> None:
    made = plan([f"recipe={name}"], basis="layout")
    stated = re.search(r"predicted ([\d.]+) of ([\d.]+) GiB", RECIPES[name])
    assert stated, f"conf/recipe/{name}.yaml states no prediction"
    assert (f"{made.memory.used / GIB:.1f}", f"{made.memory.limit / GIB:.1f}") == stated.groups()
    assert made.verdict == "fits"


def test_what_begins_with_the_head_goes_on_and_fits() -> None:
    """The second run's model is the export of the first: the same, with a head of its own."""
    assert second_runs().keys() == {name for name in RECIPES if "pretrain" in name}
    for name, (words, stated) in second_runs().items():
        first = compose([f"recipe={name}"])
        assert (first.tuning.kind, first.tuning.untie, first.model.shape.tie_word_embeddings) == ("head", True, False)
        assert first.precision.compute == "fp16" and first.batch.accumulation > 1
        untied = [*(word for word in words if not word.startswith("model.path")), "model.path=random"]
        made = plan([*untied, "model.tie_word_embeddings=false"], basis="layout")
        assert (f"{made.memory.used / GIB:.1f}", made.verdict) == (stated, "fits")


@cache
def figure(words: str) -> Plan:
    """The plan from the layout, without remedies, which take long where it does not fit."""
    return by_layout(compose(words.split()))


def host(words: str) -> float:
    """GiB of host memory for each rank."""
    return figure(words).host.need / GIB


def held(words: str, line: str) -> float:
    """GiB of a line at the loss."""
    return figure(words).ledger.lines("forward", "gpu")[line] / GIB


TOO_LARGE = "recipe=llama3_8b_qlora_1xa10 tuning=lora data.seq_len=2048 batch.micro=8"
CLAIMS = [
    ("gemma_7b_pretrain_1xt4", "14.7 GiB of the 16", lambda: host("recipe=gemma_7b_pretrain_1xt4")),
    ("gemma_7b_pretrain_1xt4", "and 18.9 if it were", lambda: host("recipe=gemma_7b_pretrain_1xt4 offload.pin_memory=true")),
    (
        "gemma_7b_pretrain_1xt4",
        "zero=none: 16.7 GiB",
        lambda: figure("recipe=gemma_7b_pretrain_1xt4 zero=none").memory.used / GIB,
    ),
    ("llama3_70b_nvme", "56 GiB of host memory", lambda: host("recipe=llama3_70b_nvme tuning=full")),
    ("llama3_70b_nvme", "9 minutes a step", lambda: figure("recipe=llama3_70b_nvme").seconds / 60),
    ("llama3_70b_nvme", "and 19 minutes", lambda: figure("recipe=llama3_70b_nvme tuning=full").seconds / 60),
    ("llama3_8b_qlora_1xa10", "15 GiB of weights", lambda: held(TOO_LARGE, "frozen")),
    ("llama3_8b_qlora_1xa10", "and 90 of activations", lambda: held(TOO_LARGE, "activations")),
]


@pytest.mark.parametrize(("name", "said", "computed"), CLAIMS, ids=[f"{name}-{said}" for name, said, _ in CLAIMS])
def test_what_the_head_of_a_recipe_says_is_planned(name: str, said: str, computed: Callable[[], float]) -> None:
    assert said in heads()[name]
    number = re.search(r"[\d.]+", said)
    assert number
    digits = len(number[0].partition(".")[2])
    assert f"{computed():.{digits}f}" == number[0]


@pytest.mark.parametrize("name", RECIPES)
def test_what_to_change_where_it_needs_too_much_needs_less(name: str) -> None:
    """Each change on top of those before it; of alternatives the first stays."""
    in_host, steps = ways_out()[name]
    words = [f"recipe={name}"]

    def needed(*more: str) -> int:
        made = figure(" ".join([*words, *more]))
        return made.host.need if in_host else made.memory.used

    used = needed()
    for alternatives in steps:
        less = [needed(change) for change in alternatives]
        assert max(less) < used, alternatives
        words, used = [*words, alternatives[0]], less[0]


def test_a_strategy_beside_a_recipe_takes_the_place_of_its_own() -> None:
    """As plan, compare and fit print it: nothing of the recipe's strategy is left beside it."""
    spec = compose(["recipe=qwen_7b_lora_4xa10", "fsdp=full_shard"])
    assert spec.strategy == compose(["model=qwen_7b", "cluster=4xa10", "tuning=lora", "fsdp=full_shard"]).strategy
    assert compose(["recipe=gemma_7b_pretrain_1xt4", "zero=none", "tuning=qlora"]).strategy.label == "plain"
    kept = compose(["recipe=gemma_7b_pretrain_1xt4", "data.seq_len=512"])
    assert kept.strategy == compose(["recipe=gemma_7b_pretrain_1xt4"]).strategy
    candidates = compare(["recipe=qwen_14b_qlora_24gb"], basis="layout")
    for made in candidates[:3]:
        assert plan(["recipe=qwen_14b_qlora_24gb", *made.words.split()], basis="layout").memory == made.memory


def test_every_weight_of_a_tied_model_is_trained_tied() -> None:
    made = plan(["recipe=llama32_1b_pretrain_1xt4", "tuning=full", "batch.micro=1", "recompute=full"], basis="layout")
    assert (f"{made.memory.used / GIB:.1f}", made.verdict) == ("13.4", "fits")
    assert compose(["recipe=llama32_1b_pretrain_1xt4", "tuning=full"]).model.shape.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_where_it_is_rehearsed(name: str) -> None:
    """And its second run. The layout does not know what the allocator keeps, nor every library's temporaries."""
    made = plan([f"recipe={name}"], basis="rehearsal", cached=False)
    assert made.basis == "rehearsal" and made.fits, made.shortfall
    if name in second_runs():
        words = [word for word in second_runs()[name][0] if not word.startswith("model.path")]
        again = plan([*words, "model.path=random", "model.tie_word_embeddings=false"], basis="rehearsal", cached=False)
        assert again.fits, again.shortfall


def test_what_the_user_says_wins() -> None:
    spec = compose(["recipe=llama3_8b_qlora_1xa10", "data.seq_len=1024", "tuning=lora", "batch.micro=1"])
    assert (spec.tuning.kind, spec.data.seq_len, spec.batch.micro, spec.model.name) == ("lora", 1024, 1, "llama3_8b")


def test_plain_adapters_do_not_fit_where_the_recipe_does() -> None:
    made = figure(TOO_LARGE)
    assert made.verdict == "short" and made.memory.short > 80 * GIB
    assert plan(["recipe=llama3_8b_qlora_1xa10", "data.seq_len=2048", "batch.micro=1"], basis="layout").verdict == "fits"


def test_zero_2_hardly_helps_adapters() -> None:
    used = {
        words: plan(["recipe=qwen_7b_lora_4xa10", *words.split()], basis="layout").memory.used
        for words in ("zero=stage0", "zero=stage2", "zero=stage3", "zero=stage3 offload=cpu", "fsdp=full_shard")
    }
    assert abs(used["zero=stage2"] - used["zero=stage0"]) < 0.05 * used["zero=stage0"]
    assert used["zero=stage3 offload=cpu"] < used["zero=stage3"] < 0.7 * used["zero=stage2"]
    assert used["fsdp=full_shard"] < 0.75 * used["zero=stage2"]


@pytest.mark.parametrize("micro", [6, 4])
def test_a_global_batch_is_the_same_however_it_is_dealt(micro: int) -> None:
    batch = compose(["recipe=small_sft_2048", f"batch.micro={micro}"]).batch
    assert batch.micro * batch.accumulation == batch.global_size == 24
