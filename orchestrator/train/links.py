"""How fast cards copy, and whether they copy right: a probe of a fraction of a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

PROBE_BYTES = 64 * 2**20
COPIES = 4


@dataclass(frozen=True, slots=True)
class Link:
    """From one place to another, "cuda:0" or "cpu": gigabytes a second, one way; `exact` whether every byte arrived."""

    source: str
    target: str
    gb_per_s: float
    exact: bool


def probe(source: str, target: str) -> Link:
    """The link between two devices, over COPIES copies of PROBE_BYTES after one that warms up."""
    pinned = torch.cuda.is_available() and "cpu" in (source, target)
    sent = torch.arange(PROBE_BYTES // 8, dtype=torch.int64)
    here = sent.pin_memory() if pinned and source == "cpu" else sent.to(source)
    there = (
        torch.empty_like(sent, pin_memory=pinned)
        if target == "cpu"
        else torch.empty(PROBE_BYTES // 8, dtype=torch.int64, device=target)
    )
    there.copy_(here)
    _wait()
    began = time.perf_counter()
    for _ in range(COPIES):
        there.copy_(here, non_blocking=True)
    _wait()
    seconds = time.perf_counter() - began
    return Link(source, target, COPIES * PROBE_BYTES / seconds / 1e9, bool(torch.equal(there.cpu(), sent)))


def _wait() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def probe_all(cards: int) -> list[Link]:
    """The link of each card to the host and to the next card, the last one's to the first."""
    links = [probe("cpu", f"cuda:{index}") for index in range(cards)]
    if cards > 1:
        links += [probe(f"cuda:{index}", f"cuda:{(index + 1) % cards}") for index in range(cards)]
    return links
