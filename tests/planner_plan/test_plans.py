"""Plans: what they say, that they survive JSON and the cache, and how they are chosen and mended."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import orchestrator
from orchestrator.config import compose
from orchestrator.errors import ConfigError, MisfitError
from orchestrator.planner import store
from orchestrator.planner.choose import choose
from orchestrator.planner.fixes import fixes
from orchestrator.planner.ladder import ladder, largest, with_length, with_micro
from orchestrator.planner.plan import FITS, LAYOUT, SHORT, TIGHT, CardUse, Fix, Plan, Room
from orchestrator.planner.planning import crossed, plan_of, ranked
from orchestrator.planner.predict import by_layout, by_rehearsal, table_for
from orchestrator.planner.prelude import settle
from orchestrator.spec import RunSpec
from orchestrator.units import GIB

LORA = ["model=llama3_8b", "tuning=lora", "data.seq_len=2048", "cluster=4xa10"]
TINY = ["model=tiny", "model.hidden_size=128", "model.num_hidden_layers=3", "data.seq_len=256", "batch.micro=2"]


def plan(*overrides: str) -> Plan:
    return orchestrator.plan(list(overrides), basis=LAYOUT)


def test_a_plan_adds_up_and_survives_json():
    made = plan(*LORA, "zero=stage3", "offload=cpu")
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.basis == LAYOUT and made.fits and made.verdict == FITS
    highest = max(made.ledger.total(phase, "gpu") for phase in ("load", "forward", "backward", "step", "save"))
    assert highest == made.memory.allocated == sum(count for _, count in made.peak.alive)
    assert made.memory.used == made.memory.reserved + made.memory.context + made.memory.communication
    assert made.host.need > sum(made.ledger.lines(home="cpu").values()) > 3.9 * GIB
    assert made.to_json()["derived"]["device_used"] == made.memory.used


def test_the_states_at_rest_are_those_of_the_layout():
    made = plan("model=llama3_8b", "cluster=8xa100_80", "zero=stage1", "data.seq_len=1024")
    parameters = 8_030_261_248
    lines = made.ledger.lines("step", "gpu")
    assert lines["weights"] == 2 * parameters
    assert lines["master"] == 4 * parameters // 8
    assert lines["moments"] == 8 * parameters // 8


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (["zero=stage3"], ["zero=stage2"]),
        (["zero=stage2", "recompute=full"], ["zero=stage2"]),
        (["zero=stage3", "offload=cpu"], ["zero=stage3"]),
        (["fsdp=full_shard"], ["fsdp=shard_grad_op"]),
        (["zero=stage3", "data.seq_len=1024"], ["zero=stage3"]),
    ],
)
def test_what_shards_more_needs_less(less, more):
    assert plan(*LORA, *less).memory.used < plan(*LORA, *more).memory.used


def test_what_does_not_fit_says_what_is_missing_and_what_would_help():
    made = plan(*LORA, "zero=stage2")
    assert made.verdict == SHORT and made.shortfall.startswith("short 4.") and "on each card in forward" in made.shortfall
    words = [fix.words for fix in made.fixes]
    assert "recompute=full" in words and any(word.startswith("fsdp=") for word in words)
    assert [fix.slowdown for fix in made.fixes[:2]] == sorted(fix.slowdown for fix in made.fixes[:2])
    for fix in made.fixes:
        assert plan(*[o for o in LORA if o.partition("=")[0] != fix.words.partition("=")[0]], *_onto("zero=stage2", fix)).fits


def _onto(strategy: str, fix: Fix) -> list[str]:
    """The overrides of a fix, beside the strategy where it does not name one."""
    words = fix.words.split()
    return words if {"zero", "fsdp", "tensor"} & {word.partition("=")[0] for word in words} else [strategy, *words]


def test_fewer_bits_are_offered_where_they_help_and_take_what_they_say():
    base = ["model=llama32_1b", "cluster=1xa10", "data.seq_len=512", "recompute=full", "zero=none"]
    large = by_layout(compose(base))
    small = by_layout(compose([*base, "optimizer=adamw_8bit"]))
    saved = large.memory.used - small.memory.used
    trained = sum(p.numel for p in table_for(compose(base)))
    assert saved == pytest.approx(trained * (8 - 2 - 8 / 256), rel=1e-3)
    spec = compose(["model=llama3_8b", "cluster=4xa10", "data.seq_len=512", "recompute=full", "fsdp=full_shard"])
    assert any(fix.words.startswith("optimizer=adamw_8bit") for fix in fixes(spec, by_layout(spec)))


def test_muon_pays_for_its_products_and_its_exchange():
    base = ["model=llama3_8b", "cluster=4xa10", "fsdp=full_shard"]
    usual, muon = (by_layout(compose([*base, f"optimizer={name}"])).time for name in ("adamw", "muon"))
    assert usual is not None and muon is not None
    assert muon.update > 10 * usual.update and muon.communication > usual.communication


def test_what_helps_a_divided_model_is_what_compose_takes():
    """A packed base has no tensor parallelism: it is proposed under another strategy or not at all."""
    words = ["model=llama3_8b", "cluster=4xa10", "data.seq_len=2048"]
    made = plan(*words, "tensor=2")
    assert made.verdict == SHORT and made.fixes
    for fix in made.fixes:
        assert any(group in fix.words for group in ("zero=", "fsdp=", "tensor=")) and plan(*words, *fix.words.split()).fits


def test_fixes_that_change_the_result_come_last():
    spec = compose(["model=llama3_8b", "cluster=1xt4", "data.seq_len=2048", "zero=stage1", "batch.micro=4"])
    found = [fix.words for fix in fixes(spec, by_layout(spec))]
    changing = [words.startswith(("optimizer", "data.seq_len", "tuning")) for words in found]
    assert changing == sorted(changing) and any(changing)


@pytest.mark.parametrize(
    ("fix", "sentence"),
    [
        (Fix("recompute=full", 5 * GIB, 1.22), "recompute=full saves 5.00 GiB for 22 % more time"),
        (Fix("batch.micro=1", GIB, 1.0), "batch.micro=1 saves 1.00 GiB at no cost in time"),
        (Fix("data.seq_len=512", GIB, 0.5), "data.seq_len=512 saves 1.00 GiB and takes 50 % less time"),
        (Fix("zero=stage3", GIB, None), "zero=stage3 saves 1.00 GiB"),
        (Fix("zero=stage2", -1, 1.0), "zero=stage2 moves the load at no cost in time"),
        (Fix("offload=cpu", GIB, 2.0, 3 * GIB),
         "offload=cpu saves 1.00 GiB (3.00 GiB of host memory for each rank) for 100 % more time"),
    ],
)  # fmt: skip
def test_a_fix_reads_as_a_sentence(fix, sentence):
    assert fix.sentence == sentence


def test_verdicts_leave_the_margin_of_their_basis():
    made = plan(*LORA, "zero=stage3")
    outside = made.memory.context + made.memory.communication

    def at(used: float) -> Plan:
        reserved = int(used * made.memory.limit) - outside
        memory = CardUse(reserved, reserved, made.memory.context, made.memory.communication, made.memory.limit)
        return replace(made, memory=memory)

    assert [at(share).verdict for share in (0.94, 0.96, 1.001)] == [FITS, TIGHT, SHORT]
    assert replace(at(0.96), basis="rehearsal").verdict == FITS
    assert replace(at(0.5), host=Room(2, 1)).verdict == SHORT
    assert replace(at(0.5), host=Room(2, 1)).shortfall == "short 1 B of host memory for each rank"
    assert replace(at(0.5), nvme=Room(2, 1)).shortfall == "short 1 B of NVMe for each rank"


def test_host_memory_is_a_budget_where_it_is_stated():
    assert plan(*LORA, "zero=stage3", "offload=cpu", "cluster.host_gib=64").fits
    made = plan(*LORA, "zero=stage3", "offload=cpu", "cluster.host_gib=16")
    assert made.verdict == SHORT and "of host memory for each rank" in made.shortfall


def test_the_fastest_that_fits_is_chosen_and_said():
    made = plan(*LORA)
    assert made.fits and any(note.startswith("chosen: ") and "the fastest of" in note for note in made.notes)
    every = orchestrator.compare(LORA, basis="layout")
    assert len(every) >= 24
    assert made.seconds <= 1.01 * min(other.seconds for other in every if other.verdict == FITS)
    assert every == ranked(every)
    assert [other.fits for other in every] == sorted((other.fits for other in every), reverse=True)


def test_nothing_fits_and_the_refusal_says_so():
    with pytest.raises(MisfitError) as refused:
        orchestrator.plan(["model=llama3_70b", "cluster=4xt4", "cluster.host_gib=64", "data.seq_len=2048"])
    assert (
        "none of" in str(refused.value) and "strategies fits" in str(refused.value) and "add tuning=lora" in str(refused.value)
    )
    with pytest.raises(MisfitError, match="take more or larger cards, a shorter"):
        choose(compose(["model=llama3_70b", "cluster=4xt4", "cluster.host_gib=64", "tuning=lora"], strict=False))


def test_groups_are_crossed_and_a_wrong_choice_is_named():
    runs = crossed(["model=llama3_8b", "tuning=lora,full", "cluster=1xa10,4xa10", "zero=stage3"])
    assert [(run.spec.tuning.kind, run.spec.cluster.name) for run in runs] == [
        ("lora", "1xa10"), ("lora", "4xa10"), ("full", "1xa10"), ("full", "4xa10"),
    ]  # fmt: skip
    one = {run.words.endswith("recompute=full") for run in crossed([*LORA, "recompute=full"])}
    assert one == {True}
    with pytest.raises(ConfigError, match="did you mean lora"):
        crossed(["model=llama3_8b", "tuning=lora,lore"])


def test_plans_are_kept_by_what_moves_them(own_cache):
    spec = compose([*TINY, "zero=stage2"])
    first = plan_of(spec, "auto")
    assert len(list(own_cache.rglob("*.json"))) == 1
    assert plan_of(replace(spec, seed=7), "auto") == first  # the seed moves no byte
    assert len(list(own_cache.rglob("*.json"))) == 1
    assert store.key(spec, "auto") != store.key(with_length(spec, 512), "auto")
    file = next(own_cache.rglob("*.json"))
    file.write_text("{")
    assert plan_of(spec, "auto") == first  # a torn file is made again
    assert json.loads(file.read_text())["label"] == "zero2"


def test_a_cache_that_cannot_be_written_stops_nothing(own_cache, monkeypatch):
    own_cache.write_text("a file where a folder should be")
    assert plan_of(compose([*TINY, "zero=stage2"]), "auto").fits


def test_a_rehearsal_and_the_layout_agree():
    """The closed form stands beside the engine's own code on fake tensors, lines and all."""
    spec = compose([*TINY, "model.intermediate_size=344", "cluster=2xa10", "fsdp=full_shard", "batch.global_size=4"])
    by_code, by_form = by_rehearsal(spec), by_layout(spec)
    assert by_code.basis == "rehearsal" and by_code.peak.phase in ("forward", "backward")
    assert by_form.memory.allocated == pytest.approx(by_code.memory.allocated, rel=0.05)
    assert by_code.memory.reserved >= by_code.memory.allocated
    assert Plan.from_json(by_code.to_json()) == by_code


@pytest.mark.parametrize("accumulated", [1, 2])
def test_copies_of_a_divided_model_are_counted_as_they_are_reduced(accumulated):
    """A group of one keeps what its all-reduces have summed beside the gradients of earlier micro-batches."""
    large = ["model=tiny", "model.vocab_size=4096", "model.hidden_size=256", "model.intermediate_size=688", "data.seq_len=32"]
    words = [*large, "precision=bf16", "cluster=4xa10", "tensor=2", "batch.micro=1", f"batch.global_size={2 * accumulated}"]
    spec = compose(words)
    assert (spec.strategy.dp_replicate, spec.strategy.dp_shard, spec.batch.accumulation) == (2, 1, accumulated)
    assert by_layout(spec).memory.allocated == pytest.approx(by_rehearsal(spec).memory.allocated, rel=0.02)


def test_gradients_wait_on_the_card_where_zero_1_sends_them_to_the_host():
    """Those that are too large for the bucket, of other ranks' parts; and the norm of the largest in double precision."""
    large = ["model=tiny", "model.vocab_size=8192", "model.hidden_size=256", "model.intermediate_size=688", "data.seq_len=32"]
    words = [*large, "precision=bf16", "cluster=2xa10", "zero=stage1", "offload=optimizer", "zero.reduce_bucket=100000"]
    spec = compose([*words, "batch.micro=1", "batch.global_size=2"])
    assert by_layout(spec).memory.allocated == pytest.approx(by_rehearsal(spec).memory.allocated, rel=0.02)


@pytest.mark.parametrize(
    "own",
    ["tensor=2", "zero=stage1 offload=optimizer", "compile=block zero=stage1 tuning=lora batch.micro=8 data.seq_len=4096"],
)
def test_every_fix_is_what_one_would_type(own):
    words = ["model=llama3_8b", "cluster=4xa10", "batch.global_size=64", *own.split()]
    made = plan(*words)
    assert made.fixes
    for fix in made.fixes:
        named = {word.partition("=")[0] for word in fix.words.split()}
        replaced = named | ({"zero", "fsdp", "tensor"} if named & {"zero", "fsdp", "tensor"} else set())
        kept = [word for word in words if word.partition("=")[0] not in replaced]
        other = plan(*kept, *fix.words.split())
        assert (other.verdict, made.memory.used - other.memory.used) == ("fits", fix.saves)


def test_an_unknown_family_is_planned_from_its_config_alone(tmp_path):
    config = {
        "model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": 512, "hidden_size": 64,
        "intermediate_size": 128,        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan(f"model.path={tmp_path}", "zero=stage1", "cluster=1xa10", "data.seq_len=128")
    assert made.fits and made.model == tmp_path.name


@pytest.mark.parametrize("curve", [lambda n: n, lambda n: n * n, lambda n: 50 * (n > 9) + n, lambda n: 1.02**n])
def test_the_search_finds_the_largest_that_passes(curve):
    """In few guesses, as each is a plan: whatever the need grows like, and where it jumps."""
    for most in (1, 2, 3, 7, 8, 100, 1024):
        for true in {0, 1, 2, 8, 9, 10, most - 1, most} & set(range(most + 1)):
            asked = []

            def left(n, true=true, asked=asked):
                asked.append(n)
                return curve(true + 0.5) - curve(n) if true else -1.0

            assert largest(left, most) == true
            assert len(asked) <= 2 * most.bit_length() + 2


def test_the_ladder_ends_where_it_stops_fitting():
    candidate = next(c for c in crossed(LORA) if c.words == "zero=stage3 recompute=full")
    rung = ladder(candidate)
    spec: RunSpec = candidate.spec
    table = table_for(spec)
    assert by_layout(with_micro(spec, rung.micro), table).verdict == FITS
    assert by_layout(with_micro(spec, rung.micro + 1), table).verdict != FITS
    assert rung.limited_by == "model" and rung.seq_len == 8192
    assert by_layout(with_length(with_micro(spec, 1), rung.seq_len), table).verdict == FITS


def test_a_run_is_settled_once_and_refused_as_it_says():
    several = compose(LORA, strict=False)
    prelude = settle(several)
    assert prelude.lines[0].startswith("chosen   ") and prelude.lines[1].startswith("plan     ")
    assert prelude.spec.strategy == compose([*LORA, *prelude.plan.words.split()]).strategy

    hopeless = ["model=llama3_8b", "cluster=4xt4", "zero=stage1", "data.seq_len=2048"]
    with pytest.raises(MisfitError) as refused:
        settle(compose(hopeless))
    text = refused.value.report()
    assert refused.value.exit_code == 3 and "short" in text and "needed" in text and "plan.on_misfit=warn" in text
    assert len(text.splitlines()) < 12
    warned = settle(compose([*hopeless, "plan.on_misfit=warn"]))
    assert warned.lines[-1].startswith("warning  ") and not warned.plan.fits
    assert len(settle(compose([*hopeless, "plan.on_misfit=ignore"])).lines) == 1
