"""How ranks meet: each says who it is and what it is about to run, before any collective could hang on a difference."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from orchestrator.errors import ConfigError, Fault
from orchestrator.spec import RunSpec, to_json
from orchestrator.train.launcher import launcher_keeps_the_store
from orchestrator.units import format_seconds

MEASURED_HERE = ("cluster.host_bytes", "cluster.card.memory_bytes", "cluster.card.source")
"""Fields of a spec that each machine fills in by itself under cluster=local, and that may differ a little."""

_STORES: Any = dist
"""torch does not export its stores to type checkers."""

ATTEMPT = "ORCHESTRATOR_ATTEMPT"
"""Set where these processes have replaced earlier ones (train/renewal.py), whose messages torchrun's store still holds."""

SHOWN = 4
SEEN_SECONDS = 2.0


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested JSON data by their dotted path."""
    if isinstance(value, Mapping):
        return {path: leaf for key, inner in value.items() for path, leaf in flat(inner, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def facts(spec: RunSpec) -> dict[str, Any]:
    """What must be the same on every rank, by dotted key."""
    leaves = flat(to_json(spec))
    if spec.cluster.name == "local":
        for key in MEASURED_HERE:
            leaves.pop(key, None)
    return leaves


@dataclass(frozen=True, slots=True)
class Hello:
    """What one rank says of itself."""

    rank: int
    size: int
    host: str
    facts: Mapping[str, Any]
    pid: int = 0

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"


def differences(hellos: list[Hello]) -> list[Fault]:
    """A fault for each fact that is not the same on all ranks, with those named that differ from most (of two equal parties,
    from rank 0's)."""
    faults = []
    told = [{"WORLD_SIZE": hello.size, **hello.facts} for hello in hellos]
    for key in dict.fromkeys(key for facts in told for key in facts):
        values = [json.dumps(facts.get(key)) for facts in told]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        odd = [f"{hello.who} has {value}" for hello, value in zip(hellos, values, strict=True) if value != usual]
        more = f", and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        problem = f"{', '.join(odd[:SHOWN])}{more}; the other {counts[usual]} have {usual}"
        faults.append(Fault(key, problem, "start every machine with the same words, files and version"))
    return faults


def open_store(rank: int, patience: timedelta) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT: torchrun's own where it keeps one, else rank 0's.

    Raises:
        ConfigError: the port is taken, or nobody answers there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = launcher_keeps_the_store()
    try:
        store = _STORES.TCPStore(
            host, port, None, is_master=rank == 0 and not agents, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, dist.DistError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            problem = f"port {port} is taken: another run meets there"
            remedy = f"deepspeed --master_port={port + 1} …, torchrun --master-port={port + 1} …, or MASTER_PORT={port + 1}"
        else:
            problem = f"nobody answers at {host}:{port} within {format_seconds(patience.total_seconds())}"
            remedy = "rank 0 must be running there, and no firewall between: look at its output"
        raise ConfigError(Fault("MASTER_PORT", problem, remedy)) from None
    return _STORES.PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}{os.environ.get(ATTEMPT, '')}", store)


def meet(store: Any, rank: int, size: int, about: Mapping[str, Any], patience: timedelta) -> list[Hello]:
    """What every rank says, in rank order, once all agree.

    Raises:
        ConfigError: ranks differ in what they are about to run, one is there twice, or one has not come.
    """
    own = Hello(rank, size, socket.gethostname(), about, os.getpid())
    if store.add(f"count/{rank}", 1) > 1:
        problem = f"two processes say that they are rank {rank}; this one runs on {own.host}"
        raise ConfigError(Fault("RANK", problem, "start every machine with its own --node-rank, or another port"))
    store.set(f"hello/{rank}", json.dumps([size, own.host, about, own.pid]))
    hellos: list[Hello] = []
    for other in range(size):
        try:
            store.wait([f"hello/{other}"], patience)
        except (RuntimeError, dist.DistError):
            raise _absent(store, size, patience) from None
        hellos.append(Hello(other, *json.loads(store.get(f"hello/{other}"))))
        if hellos[-1].size != size:
            break
    faults = differences(hellos)
    if faults:
        _let_all_see(store, rank, len(hellos))
        raise ConfigError(faults)
    return hellos


def check_alike(told: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Hold what every rank has (host, facts) `told`, in rank order, to the others.

    Raises:
        ConfigError: ranks differ.
    """
    faults = differences([Hello(other, len(told), host, facts) for other, (host, facts) in enumerate(told)])
    if faults:
        raise ConfigError(faults)


def _absent(store: Any, size: int, patience: timedelta) -> ConfigError:
    there = [rank for rank in range(size) if store.check([f"hello/{rank}"])]
    hosts = Counter(json.loads(store.get(f"hello/{rank}"))[1] for rank in there)
    missing = [rank for rank in range(size) if rank not in there]
    names = ", ".join(map(str, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
    here = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    problem = f"rank {names} of {size} has not come within {format_seconds(patience.total_seconds())}; there are {here}"
    remedy = f"look at the launcher's output on the other machines: do they reach {os.environ.get('MASTER_ADDR')}?"
    return ConfigError(Fault("ranks", problem, remedy))


def _let_all_see(store: Any, rank: int, ranks: int) -> None:
    """Rank 0 may keep the store: it must not go before the others have read why they end."""
    store.set(f"seen/{rank}", "")
    if rank == 0:
        try:
            store.wait([f"seen/{other}" for other in range(ranks)], timedelta(seconds=SEEN_SECONDS))
        except (RuntimeError, dist.DistError):
            return  # they have gone already
