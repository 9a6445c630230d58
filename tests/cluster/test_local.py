"""The machine at hand, and the table of cards."""

import pytest
import yaml

from orchestrator.cluster import card_of, hardware, local, local_cluster
from orchestrator.config import compose
from orchestrator.errors import ConfigError
from orchestrator.spec import Card
from orchestrator.units import GIB


def test_host_memory_is_the_container_s_where_that_is_lower(tmp_path):
    machine = local.host_bytes(())
    limit = tmp_path / "memory.max"
    assert local.host_bytes((tmp_path / "absent",)) == machine > 0
    limit.write_text("max\n")
    assert local.host_bytes((limit,)) == machine
    limit.write_text(f"{GIB // 2}\n")
    assert local.host_bytes((limit,)) == GIB // 2


def test_a_job_s_limit_counts_wherever_it_stands_above_the_process(tmp_path):
    """As Slurm (v2) and older container engines (v1) place a process: the limit stands one level up."""
    membership, hierarchy = tmp_path / "cgroup", tmp_path / "fs"
    for text, place in (
        ("0::/system.slice/slurmstepd.scope/job_7/step_0\n", "system.slice/slurmstepd.scope/job_7/memory.max"),
        ("3:cpu:/a\n9:memory,x:/docker/b/c\n", "memory/docker/b/memory.limit_in_bytes"),
    ):
        membership.write_text(text)
        (hierarchy / place).parent.mkdir(parents=True)
        (hierarchy / place).write_text(f"{GIB // 4}\n")
        assert local.host_bytes(local.cgroup_limits(membership, hierarchy)) == GIB // 4
        (hierarchy / place).unlink()
    assert local.cgroup_limits(tmp_path / "absent", hierarchy)[0] == hierarchy / "memory.max"


@pytest.mark.parametrize(
    ("count", "listed", "indices"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, "", []),
        (4, "2,3", [2, 3]),
        (4, "1,-1,2", [1]),
        (2, "0,5", [0]),
        (0, None, []),
        (2, "GPU-a,GPU-b", [0, 1]),
    ],
)
def test_visible_cards_are_those_that_cuda_would_use(count, listed, indices):
    assert local.visible(count, listed) == indices


def test_without_cards_ranks_share_the_host(monkeypatch):
    monkeypatch.setattr(local, "cards", list)
    one, four = local_cluster(), local_cluster(4)
    assert (one.cards, four.cards, four.card.name) == (1, 4, "cpu")
    assert four.card.memory_bytes == one.host_bytes // 4


def test_with_cards_ranks_are_cards(monkeypatch):
    found = [card_of("NVIDIA A10", 22 * GIB, 8), card_of("NVIDIA A10", 21 * GIB, 8)]
    monkeypatch.setattr(local, "cards", lambda: found)
    cluster = local_cluster()
    assert (cluster.cards, cluster.card.name, cluster.card.memory_bytes) == (2, "A10", 21 * GIB)
    assert local_cluster(1).cards == 1
    with pytest.raises(ConfigError, match="3 ranks run on this machine, but it shows 2 cards"):
        local_cluster(3)


def test_nodes_are_told_by_the_launcher(monkeypatch):
    monkeypatch.setattr(local, "cards", list)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cluster = local_cluster(8)
    assert (cluster.nodes, cluster.cards_per_node, cluster.cards) == (4, 2, 8)


def test_every_card_is_found_by_each_name_that_the_driver_gives():
    for path in hardware.TABLE.glob("*.yaml"):
        row = yaml.safe_load(path.read_text())
        for name in row["nvml"]:
            card = card_of(name, GIB, 8)
            assert (card.name, card.memory_bytes, card.bf16) == (row["name"], GIB, row["bf16"])


def test_an_unknown_card_has_no_rates():
    assert card_of("NVIDIA Unheard", GIB, 7) == Card("NVIDIA Unheard", GIB, 0.0, 0.0, 0.0, False, "NVML; rates unknown")
    assert card_of("NVIDIA Unheard", GIB, 9).bf16


def test_this_machine_composes():
    spec = compose(["zero=stage3", "offload=cpu"], ranks=1, local=local_cluster)
    assert spec.cluster.name == "local" and spec.cluster.card.memory_bytes > 0
