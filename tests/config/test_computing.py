"""What is refused of the loss, recompute and attention, and what to do instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.config import compose, computing
from orchestrator.config.schema import AttentionConf, AttentionKind, LossConf, LossKind
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


def test_a_kernel_whose_package_is_absent_is_refused_on_the_card_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "FLASH", "flash_attn_that_nobody_has")
    monkeypatch.setattr(computing, "LIGER", "liger_kernel_that_nobody_has")
    spec = compose(["model=llama3_8b", "cluster=1xa10"])
    here = replace(spec.cluster, name="local")
    asked = AttentionConf(kind=AttentionKind.flash), LossConf(kind=LossKind.liger)
    (flash,) = computing.attention_faults(asked[0], here, "bf16", "none")
    assert (flash.problem, "attention=sdpa" in flash.remedy) == (
        "attention=flash, but the package flash-attn is not installed", True,
    )  # fmt: skip
    (liger,) = computing.loss_faults(asked[1], here, spec.model)
    assert "liger-kernel is not installed" in liger.problem and "pip install liger-kernel" in liger.remedy
    assert not computing.attention_faults(asked[0], spec.cluster, "bf16", "none"), "another machine may have it"


def test_what_is_said_reaches_the_spec() -> None:
    spec = compose([*A10, "zero=stage2", "recompute=every_n", "recompute.every=4", "attention=flash", "data.seq_len=512"])
    assert (spec.recompute, spec.recompute_every, spec.attention) == ("every_n", 4, "flash")
