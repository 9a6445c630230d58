"""A look at every machine before a run loads anything: what the doctor would say of it, for this run.

What would fail the run ends it here, with the machine named; what may slow it is one line. Links are not probed: that would
take memory of the cards.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.cluster import doctor
from orchestrator.cluster.doctor import Check, Finding, Need, Severity
from orchestrator.cluster.machine import this_machine
from orchestrator.errors import ConfigError, Fault
from orchestrator.layout import STEPPED, lay_out, saved_bytes
from orchestrator.spec import Home, Parameter, RunSpec
from orchestrator.train.folder import ROOT
from orchestrator.train.world import World

Told = tuple[str, Finding]
"""The host that a finding is about, and the finding."""


def need_of(spec: RunSpec, table: Sequence[Parameter], ranks: int) -> Need:
    """What `spec`, whose parameters are `table`, asks of a machine with `ranks` of its ranks. Without cards all memory is
    the host's, and the plan has looked at it."""
    on_cards = spec.cluster.card.name != "cpu"
    in_host = sum(row.bytes for row in lay_out(spec, table).at(STEPPED) if row.home is Home.CPU)
    on_disk = spec.strategy.nvme is not None
    return Need(
        ranks=ranks,
        nodes=spec.cluster.nodes,
        on_cards=on_cards,
        bf16=on_cards and spec.precision.compute == "bf16",
        pinned_bytes=in_host * ranks if on_cards else 0,
        disk_bytes=max(doctor.FREE_BYTES, saved_bytes(spec.optimizer, [each for each in table if each.trainable])),
        compiles=on_disk,
        nvme=on_disk,
    )


def checks_for(need: Need) -> tuple[Check, ...]:
    """Those of the doctor's checks that can say anything about a run with `need`."""
    left_out = set() if need.on_cards else set(doctor.OF_CARDS)
    if not need.compiles:
        left_out.add(doctor.operators)
    return tuple(check for check in doctor.CHECKS if check not in left_out)


def judged(told: Iterable[Told]) -> tuple[str, ...]:
    """What to tell a person of what was found: nothing, or one line.

    Raises:
        ConfigError: something would fail the run.
    """
    found = [(host, finding) for host, finding in told if finding.severity is not Severity.FINE]
    fails = [(host, finding) for host, finding in found if finding.severity is Severity.FAILS]
    if fails:
        raise ConfigError([Fault(f"{each.about} on {host}", f"{each.found}: {each.effect}", each.mend) for host, each in fails])
    if not found:
        return ()
    names = ", ".join(dict.fromkeys(finding.about for _, finding in found))
    return (f"machine  may slow the run or break it later: {names}; python launch/doctor.py says why and what mends it",)


def _folder(spec: RunSpec) -> Path:
    return ROOT if spec.run.dir is None else Path(spec.run.dir)


def look(spec: RunSpec, table: Callable[[], Sequence[Parameter]], world: World) -> tuple[str, ...]:
    """What to tell a person of the machines of `world`: nothing, or one line. The first rank of each machine looks, and asks
    for the `table` of the parameters.

    Raises:
        ConfigError: something would fail the run; on every rank alike.
    """
    own: list[Told] = []
    if world.local_rank == 0:
        need = need_of(spec, table(), world.local_size)
        machine = this_machine([_folder(spec)])
        own = [(world.host, finding) for finding in doctor.examine(machine, need, checks_for(need))]
    return judged(told for each in world.gather(own) for told in each)


def shared(spec: RunSpec, table: Sequence[Parameter]) -> tuple[str, ...]:
    """What to tell a person who submits a job from here of what its nodes will share with this machine: the file system of
    the run folder, and the environment.

    Raises:
        ConfigError: a checkpoint would not fit.
    """
    need = need_of(spec, table, spec.cluster.cards_per_node)
    found = doctor.examine(this_machine([_folder(spec)]), need, doctor.SHARED)
    return judged((socket.gethostname(), finding) for finding in found)
