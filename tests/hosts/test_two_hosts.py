"""One run on two hosts without Slurm: each launcher that the documentation names, over a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts.two import NAMES, TwoHosts, binary, missing

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
WORDS = (
    TRAIN, "zero=stage2", "model=tiny", "model.hidden_size=32", "model.head_dim=8", "model.intermediate_size=64",
    "model.num_hidden_layers=2", "batch.global_size=8", "data.seq_len=64", "run.steps=6", "export.format=none",
)  # fmt: skip
SECONDS = 800


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with TwoHosts(tmp_path) as two:
        yield two


def quiet(home: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{home}/cache"}


def torchrun(hosts: TwoHosts, run: str, *words: str) -> list[float]:
    """The losses of a run of one rank on each host that torchrun starts; NODE in `words` is the place of each."""
    logs = [hosts.home / f"{run}-{name}.log" for name in NAMES]
    started = [
        hosts.start(
            name, binary("torchrun"), "--nnodes=2", "--nproc-per-node=1", *(word.replace("NODE", str(place)) for word in words),
            *WORDS, f"run.dir={hosts.home}/{run}", log=log, **quiet(hosts.home),
        )
        for place, (name, log) in enumerate(zip(NAMES, logs, strict=True))
    ]  # fmt: skip
    said = [(process.wait(SECONDS), log.read_text()) for process, log in zip(started, logs, strict=True)]
    assert [code for code, _ in said] == [0, 0] and "2 ranks on cpu" in said[0][1], said
    return losses(hosts.home / run)


def alone(hosts: TwoHosts) -> Any:
    """The losses of the same run as one rank on one host, as far as sums in another order keep them."""
    log = hosts.home / "alone.log"
    words = (*WORDS, f"run.dir={hosts.home}/alone")
    assert hosts.start("h1", sys.executable, *words, log=log, **quiet(hosts.home)).wait(SECONDS) == 0, log.read_text()
    return pytest.approx(losses(hosts.home / "alone"), rel=2e-6)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_that_torchrun_joins_train_as_one_host_does(hosts: TwoHosts) -> None:
    apart = torchrun(hosts, "static", "--node-rank=NODE", "--master-addr=h1", "--master-port=29500")
    assert len(apart) == 6 and apart == alone(hosts)


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_meeting_over_c10d_and_the_hostfile_of_deepspeed_give_the_same_losses(hosts: TwoHosts) -> None:
    one = alone(hosts)
    assert torchrun(hosts, "c10d", "--rdzv-backend=c10d", "--rdzv-endpoint=h1:29501", "--rdzv-id=two") == one
    reason = missing(("pdsh", "ssh", "ssh-keygen"))
    if reason:
        pytest.skip(f"torchrun's part has passed; deepspeed's hostfile: {reason}")
    hosts.open_ssh()
    (hosts.home / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (hosts.home / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in quiet(hosts.home).items()))
    log = hosts.home / "deepspeed.log"
    started = hosts.start(
        "h1", binary("deepspeed"), f"--hostfile={hosts.home}/hostfile", "--launcher=pdsh", "--master_port=29502", *WORDS,
        f"run.dir={hosts.home}/deepspeed", log=log, **quiet(hosts.home),
    )  # fmt: skip
    assert started.wait(SECONDS) == 0, log.read_text()
    assert losses(hosts.home / "deepspeed") == one and "h2:" in log.read_text()
