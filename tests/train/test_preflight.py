"""What is looked at before a run loads anything: what would fail it stops it, and what may slow it is one line."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from machines import SOUND, T4

from orchestrator.cluster.doctor import Severity, examine
from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.layout import STEPPED, lay_out, parameter_table
from orchestrator.spec import Home
from orchestrator.train import preflight
from orchestrator.units import GIB

WORDS = ("model=llama3_8b", "cluster=4xa10", "zero=stage3", "offload=cpu")


def found(machine, *words):
    spec = compose([*WORDS, *words])
    need = preflight.need_of(spec, parameter_table(spec), spec.cluster.cards_per_node)
    return [("n1", finding) for finding in examine(machine, need, preflight.checks_for(need))]


def test_a_need_is_what_the_layout_puts_in_host_memory_and_on_disk():
    spec = compose([*WORDS, "cluster.nodes=2"])
    table = parameter_table(spec)
    need = preflight.need_of(spec, table, 4)
    in_host = sum(row.bytes for row in lay_out(spec, table).at(STEPPED) if row.home is Home.CPU)
    assert need.pinned_bytes == 4 * in_host > 60 * GIB and need.disk_bytes > 80 * GIB
    assert (need.ranks, need.nodes, need.on_cards, need.bf16, need.nvme) == (4, 2, True, True, False)


def test_a_sound_machine_is_not_talked_about():
    assert preflight.judged(found(SOUND)) == ()


def test_what_may_slow_a_run_is_one_line_with_where_to_read_more():
    (line,) = preflight.judged(found(replace(SOUND, unpeered=((0, 1),), installed={"torch": "2.14.0"})))
    assert "peers, versions; python launch/doctor.py" in line


def test_what_would_fail_a_run_is_named_with_its_machine_all_together():
    poor = replace(SOUND, available_bytes=20 * GIB, shm_bytes=64 * 2**20, cards=(T4,) * 4, free={"runs": GIB})
    with pytest.raises(ConfigError) as caught:
        preflight.judged(found(poor))
    fields = {fault.field for fault in caught.value.faults}
    assert fields == {"host memory on n1", "/dev/shm on n1", "bf16 on n1", "disk on n1"}
    assert "code -9" in caught.value.report() and "--ipc=host" in caught.value.report()


def test_a_run_on_the_processor_does_not_ask_for_cards_or_compilers():
    idle = replace(SOUND, torch_cuda=None, shm_bytes=64 * 2**20, compiler=None, libaio=False)
    told = found(idle, "cluster=2xcpu", "model=tiny")
    assert {finding.about for _, finding in told if finding.severity is not Severity.FINE} == {"/dev/shm"}
    assert {finding.severity for _, finding in told} == {Severity.FINE, Severity.RISK}


def test_hidden_cards_and_a_build_without_cuda_are_a_choice():
    (finding,) = [each for each in examine(replace(SOUND, cards=(), torch_cuda=None)) if each.about == "driver"]
    assert finding.severity is Severity.FINE


def test_the_look_takes_a_moment(world):
    spec = compose(["model=tiny"], ranks=1)
    preflight.look(spec, lambda: parameter_table(spec), world)
    began = time.process_time()
    preflight.look(spec, lambda: parameter_table(spec), world)
    assert time.process_time() - began < 2.0


def test_a_job_is_refused_where_its_checkpoint_does_not_fit_on_the_shared_disk(monkeypatch):
    spec = compose(WORDS)
    monkeypatch.setattr(preflight, "this_machine", lambda folders: replace(SOUND, cards=(), free={"runs": GIB}))
    with pytest.raises(ConfigError, match=r"disk on .*does not fit"):
        preflight.shared(spec, parameter_table(spec))
