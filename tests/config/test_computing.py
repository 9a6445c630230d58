"""What is refused of the loss, recompute and attention, and what to do instead."""

from __future__ import annotations

import pytest

from orchestrator.config import compose
from orchestrator.errors import ConfigError

A10 = ["model=llama3_8b", "cluster=4xa10"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recompute.every=3"], "only recompute=every_n leaves blocks out"),
        (
            ["tensor=2", "cluster=2xa10", "recompute=selective"],
            "keeps matrix products, and tensor=2 adds their parts up in place",
        ),
        (["attention=flash"], "attention=flash runs on NVIDIA cards, and this machine has none"),
        (["attention=flash", "cluster=1xt4"], "needs an Ampere card or newer, and this is a T4"),
        (["attention=flash", "cluster=1xa10", "precision=fp32"], "computes in half precision, and this run in fp32"),
        (["attention=flash", "cluster=1xa10", "data.packing=best_fit"], "documents could see each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["model=tiny", *words])
    assert said in str(caught.value)


def test_what_is_said_reaches_the_spec() -> None:
    spec = compose([*A10, "zero=stage2", "recompute=every_n", "recompute.every=4", "attention=flash", "data.seq_len=512"])
    assert (spec.recompute, spec.recompute_every, spec.attention) == ("every_n", 4, "flash")
