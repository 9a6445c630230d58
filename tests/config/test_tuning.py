"""What is trained, as it is typed and as it is refused."""

from __future__ import annotations

import pytest

from orchestrator.config import compose
from orchestrator.errors import ConfigError

TIED = "model.tie_word_embeddings=true"


def test_qlora_quantises_its_scales_unless_told_not_to():
    assert compose(["tuning=qlora"]).tuning.form == "nf4-double"
    assert compose(["tuning=qlora", "tuning.double_quant=false"]).tuning.form == "nf4"
    assert compose(["tuning=lora"]).tuning.form == ""


def test_norms_are_those_of_the_family():
    llama = compose(["tuning=lora", "tuning.modules=norms"]).tuning.modules
    assert llama == ("input_layernorm", "post_attention_layernorm", "norm")
    qwen = compose(["tuning=lora", "tuning.modules=[norms,lm_head]", "model.model_type=qwen3"]).tuning.modules
    assert {"q_norm", "k_norm", "lm_head"} <= set(qwen)


def test_an_untied_head_is_another_shape():
    spec = compose(["tuning=head", "tuning.untie=true", TIED])
    assert spec.tuning.untie and spec.model.shape is not None and not spec.model.shape.tie_word_embeddings


def test_rslora_scales_by_the_root_of_the_rank():
    words = ["tuning=lora", "tuning.rank=16", "tuning.alpha=32"]
    assert compose(words).tuning.scaling == 2.0
    assert compose([*words, "tuning.rslora=true"]).tuning.scaling == 8.0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (f"tuning=head {TIED}", ["ties its head to its embedding", "tuning.untie=true", "tuning=lora"]),
        (f"tuning=lora tuning.modules=[embed_tokens] {TIED}", ["tuning.modules=[embed_tokens]", "ties its head"]),
        ("tuning=head tuning.untie=true", ["tuning.untie: would have no effect", "not tied"]),
        ("tuning=lora tuning.modules=[q_proj]", ["q_proj: linear layers of the blocks get adapters", "tuning.targets"]),
        ("tuning=qlora tuning.modules=[foo]", ["llama has no module foo", "valid: embed_tokens, lm_head, norms"]),
        ("tuning=lora tuning.modules=[q_norm]", ["llama has no module q_norm"]),
        ("tuning=lora tuning.modules=5", ["no list of module names"]),
        ("tuning=head tuning.rslora=true", ["tuning.rslora: would have no effect", "add tuning=lora"]),
        ("tuning=head export.merge=true", ["tuning=head has no adapters to fold in"]),
        ("tuning=full tuning.quant=int8", ["only tuning=qlora and tuning=head quantise the base"]),
        ("tuning=head tuning.double_quant=true", ["and tuning=head with tuning.quant, quantise"]),
        ("tuning=qlora tuning.dora=true", ["finds packed bits", "use tuning=lora"]),
        ("tuning.dora=true", ["tuning.dora", "would have no effect", "add tuning=lora"]),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_can(words, parts):
    with pytest.raises(ConfigError) as caught:
        compose(words.split())
    report = caught.value.report()
    assert all(part in report for part in parts) and len(report.splitlines()) < 8, report
