"""What a candidate says to type composes to exactly its spec."""

from __future__ import annotations

import pytest

from orchestrator.config import compose
from orchestrator.planner.candidates import candidates, typed


@pytest.mark.parametrize(
    "base",
    [
        ["model=llama3_8b", "cluster=4xa10", "tuning=lora", "data.seq_len=1024"],
        ["model=llama32_1b", "cluster=1xa10", "data.seq_len=1024"],
        ["model=qwen25_0_5b", "cluster=4xt4", "data.seq_len=512"],
        ["model=tiny", "cluster.cards_per_node=2"],
        ["model=qwen25_0_5b", "cluster=2xa10", "data.seq_len=512", "optimizer=muon"],
        ["model=qwen25_0_5b", "cluster=1xa10", "data.seq_len=512", "optimizer=paged_adamw_8bit"],
    ],
    ids=" ".join,
)
def test_words_compose_to_the_spec(base):
    ranks = 2 if "model=tiny" in base else None
    spec = compose(base, ranks=ranks, strict=False)
    every = candidates(spec)
    assert len({candidate.words for candidate in every}) == len(every)
    plain = [candidate for candidate in every if candidate.spec.recompute == "none"]
    for candidate in (*plain, every[-1]):
        composed = compose([*base, *candidate.words.split()], ranks=ranks)
        assert composed == candidate.spec, candidate.words
        assert typed(composed) == candidate.words


def test_four_cards_have_all_strategies():
    spec = compose(["model=llama3_8b", "cluster=4xa10"], strict=False)
    words = {candidate.words for candidate in candidates(spec)}
    assert len(words) >= 24
    assert {
        "zero=stage0",
        "zero=stage3 offload=cpu recompute=full",
        "fsdp=hybrid_shard",
        "fsdp=full_shard offload=cpu",
        "tensor=4",
        "fsdp=full_shard tensor=2 recompute=full",
    } <= words
    assert not any("tensor=4 " in word for word in {c.words for c in candidates(compose(["cluster=4xa10"], strict=False))})
    assert "zero=none" not in words


def test_a_global_batch_that_ranks_do_not_divide_has_no_candidate():
    from dataclasses import replace

    from orchestrator.spec import Batch

    spec = compose(["cluster=4xa10"], strict=False)
    assert candidates(replace(spec, batch=Batch(7, 1, 1))) == ()
