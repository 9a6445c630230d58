"""This process among its peers: rank, device, and the small messages that ranks exchange about the run itself."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from orchestrator.errors import ConfigError, Fault, OrchestratorError
from orchestrator.train.launcher import PeerFailure, ranks_from_environment
from orchestrator.train.meeting import meet, open_store

T = TypeVar("T")

POLL = timedelta(seconds=10)
_TURNS = itertools.count()
"""Numbers the waits for rank 0; every rank of a run comes to the same ones in the same order."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MEETING_TIMEOUT = timedelta(minutes=10)
"""Machines of one job may start minutes apart."""

CONTROL_TIMEOUT = timedelta(hours=4)
"""Ranks wait this long for each other to save or to export; a peer that dies is noticed at once all the same. For what rank
0 does alone (tokenising, say) they wait without limit."""


@dataclass(frozen=True, slots=True)
class World:
    """Rank `rank` of `size`, and `local_rank` of the `local_size` on this machine. `control` carries messages over gloo.

    `store` is where the ranks have met, `hosts` the machine of each and `pids` its process there; without one nothing is
    watched.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: Any
    store: Any = None
    hosts: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()

    @property
    def host(self) -> str:
        return self.hosts[self.rank] if self.hosts else socket.gethostname()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def beside(self) -> World:
        """This world with messages of its own, for a thread that works while this one goes on. Every rank must ask for it."""
        return replace(self, control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank. Values must be plain data."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def tell(self, value: T) -> T:
        """Rank 0's `value`, on every rank. Values must be plain data or frozen specs."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank.

        Raises:
            OrchestratorError: `work` raised it on rank 0; every rank raises an equal one.
            RuntimeError: `work` failed otherwise; rank 0 raises the original.
        """
        outcome: tuple[str, Any] = ("", None)
        failure: Exception | None = None
        if self.first:
            try:
                outcome = ("done", work())
            except OrchestratorError as error:
                failure, outcome = error, ("refused", (type(error), error.faults))
            except Exception as error:
                failure, outcome = error, ("failed", f"{type(error).__name__}: {error}")
        self._await_first()
        kind, value = self.tell(outcome)
        if failure is not None:
            raise failure
        if kind == "refused":
            error_class, faults = value
            raise error_class(faults)
        if kind == "failed":
            raise PeerFailure(f"rank 0 failed: {value}")
        return value

    def _await_first(self) -> None:
        """Wait until rank 0 comes here, for as long as it takes: no collective with a time limit is open meanwhile.

        The store lives with rank 0 or its launcher: where they die, the wait ends with a DistNetworkError.
        """
        if self.size == 1:
            return None
        store, key = dist.distributed_c10d._get_default_store(), f"orchestrator/first/{next(_TURNS)}"
        if self.first:
            store.set(key, "")
            return None
        while True:
            try:
                return store.wait([key], POLL)
            except dist.DistStoreError:  # not yet
                continue

    def agree(self, failure: str | None) -> list[str]:
        """The failures of all ranks, prefixed with their rank, on every rank; empty when every rank gave None."""
        return [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(failure)) if text is not None]


def _fill_environment() -> None:
    """State a world of one for libraries that read the variables themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)),
    ):  # fmt: skip
        os.environ.setdefault(name, value)


def _device(local_rank: int, card: str) -> torch.device:
    if card == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise ConfigError(
            Fault("ranks", f"local rank {local_rank} needs a card of its own, but this machine has {cards}",
                  f"start at most {cards} ranks on this machine (--num_gpus {cards}, --nproc-per-node={cards})")
        )  # fmt: skip
    return torch.device("cuda", local_rank)


def _share_cores(local_size: int) -> None:
    """Give each rank of this machine its share of the cores. A person's OMP_NUM_THREADS stands; torchrun's own 1 does not."""
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))


def _record_collectives(folder: str) -> None:
    """Switch NCCL's flight recorder on: the last collectives of each rank, kept in a ring and written when one times out or
    when the watch asks (torch/csrc/distributed/c10d/FlightRecorder.hpp). What a person has set stands."""
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"), ("TORCH_FR_DUMP_TEMP_FILE", folder),
    ):  # fmt: skip
        os.environ.setdefault(name, value)


def join(card: str = "", about: Mapping[str, Any] | None = None, patience: timedelta = MEETING_TIMEOUT) -> World:
    """Join the process group that the launcher's environment describes; a world of one where there is none.

    `about` is what must be the same on every rank; who differs, or has not come within `patience`, is named. `card` "cpu"
    keeps a machine's cards out of it. CPU tensors travel over gloo also where cards use NCCL, since offloaded states need
    both. DeepSpeed finds this group and makes none of its own.

    Raises:
        ConfigError: more ranks on this machine than it has cards, or ranks that do not agree.
    """
    alone = "WORLD_SIZE" not in os.environ
    if alone:
        _fill_environment()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), ranks_from_environment()[1]
    device = _device(local_rank, card)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores(local_size)
    store: Any = None
    hosts: tuple[str, ...] = (socket.gethostname(),)
    pids: tuple[int, ...] = (os.getpid(),)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        stores: Any = dist  # torch does not export HashStore to type checkers
        store = stores.HashStore() if alone else open_store(rank, patience)
        if not alone:
            hellos = meet(store, rank, size, about or {}, patience)
            hosts, pids = tuple(hello.host for hello in hellos), tuple(hello.pid for hello in hellos)
        if device.type == "cuda":
            _record_collectives(str(Path(tempfile.gettempdir()) / "nccl_trace_rank_"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return World(rank, size, local_rank, local_size, device, control, store, hosts, pids)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
