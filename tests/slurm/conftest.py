"""One Slurm for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from slurm.cluster import PACKAGES, Cluster, missing
from worlds import world_of_one

from orchestrator.train.world import World


def _install() -> str:
    """Why Slurm is not there; "" when it is, installed just now where that was needed and possible."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    if missing() and shutil.which("apt-get"):
        words = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        subprocess.run(words, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, timeout=300)
    if missing():
        return f"not installed: {', '.join(missing())} (packages {', '.join(PACKAGES)}, and apt-get could not get them)"
    if subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this container may not make namespaces"
    return ""


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = _install()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
