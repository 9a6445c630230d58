"""A private Slurm of two nodes, each in network, host name and process namespaces of its own. Root, no systemd.

Everything is a child of the test process and lies in one folder, nothing in /etc. The controller and a bridge share one
network namespace; a node is one more, joined to the bridge, so that ranks of two nodes really meet over a network. Each node
has one core, so that a rank computes in one thread: two would wait for each other on a busy machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter", "taskset", "ip")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NETWORK, BRIDGE, PORT = "10.99.0", "10.99.0.1", 16817
NODES, CORES = ("n1", "n2"), 4
PATIENCE, SILENCE = 30.0, 240.0
"""Seconds: until a daemon answers, and without a sign of life from a job."""

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=ctl({bridge})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/run/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
GresTypes=gpu
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=12
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=patient Nodes=n[1-2] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that a private Slurm needs and this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def wait_for(
    what: str, seen: Callable[[], object], seconds: float = PATIENCE, moving: Callable[[], object] = lambda: None
) -> None:
    """Return when `seen` gives something true. Time counts anew whenever `moving` gives something else: on a machine that
    others use as well, work that goes on may take any time.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    state, deadline = moving(), time.monotonic() + seconds
    while not seen():
        now = moving()
        if now != state:
            state, deadline = now, time.monotonic() + seconds
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {seconds:.0f} s")
        time.sleep(0.05)


class Cluster:
    """A running Slurm. Use it as a context."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._children: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.inside: list[str] = []
        """The words that run a command where the controller is."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment["SLURM_CONF"] = str(home / "etc/slurm.conf")

    def __enter__(self) -> Cluster:
        self._write()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _write(self) -> None:
        for folder in ("etc", "run", "log", "state", *(f"spool/{node}" for node in NODES)):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        for card in range(CORES):  # each a second /dev/null: Slurm counts device files
            os.mknod(self.home / f"run/card{card}", 0o20666, os.makedev(1, 3))
        key = self.home / "etc/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={self.address(node)} Port={PORT + 1} CPUs={CORES} RealMemory=4000 Gres=gpu:{CORES} "
            f"Feature=only_{node}"
            for node in NODES
        )
        files = {
            "slurm.conf": CONFIGURATION.format(bridge=BRIDGE, port=PORT, home=self.home, nodes=nodes),
            "gres.conf": f"Name=gpu File={self.home}/run/card[0-{CORES - 1}]\n",
            "cgroup.conf": "CgroupAutomount=no\n",
            "hosts": "127.0.0.1 localhost\n" + f"{BRIDGE} ctl\n" + "".join(f"{self.address(n)} {n}\n" for n in NODES),
        }
        for name, text in files.items():
            (self.home / "etc" / name).write_text(text)

    @staticmethod
    def address(node: str) -> str:
        return f"{NETWORK}.{10 + int(node[1:])}"

    def _child(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.home / "log/daemons.out").open("ab") as log:
            child = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._children.append(child)
        return child

    def _start(self) -> None:
        up = self.home / "run/up"
        network = (
            f"ip link set lo up; ip link add br0 type bridge; ip addr add {BRIDGE}/24 dev br0; ip link set br0 up; "
            f"mount --bind {self.home}/etc/hosts /etc/hosts; hostname ctl; touch {up}; exec sleep infinity"
        )
        holder = self._child("unshare", "--net", "--mount", "--uts", "bash", "-ec", network)
        wait_for("the network", up.exists)
        self.inside = ["nsenter", "-t", str(holder.pid), "-n", "-m", "-u", f"--wdns={Path.cwd()}"]
        run, log = self.home / "run", self.home / "log"
        self._child(
            *self.inside, "munged", "-F", "--force", f"--key-file={self.home}/etc/munge.key",
            f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log",
            f"--seed-file={run}/munge.seed", "--num-threads=2",
        )  # fmt: skip
        wait_for("munge", (run / "munge.socket").exists)
        self._child(*self.inside, "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        wait_for("both nodes idle", lambda: len(self.idle()) == len(NODES))

    def start_node(self, node: str) -> None:
        """Boot `node`: its namespaces, its link to the bridge, its daemon."""
        up, linked = self.home / f"run/{node}.up", self.home / f"run/{node}.linked"
        cores = sorted(os.sched_getaffinity(0))
        core = cores[NODES.index(node) % len(cores)]
        boot = (
            f"hostname {node}; ip link set lo up; touch {up}; until [ -e {linked} ]; do sleep 0.02; done; rm {linked}; "
            f"taskset -c {core} slurmd -D -N {node} & wait"
        )
        spaces = ("--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        child = self._child(*self.inside, "unshare", *spaces, "bash", "-ec", boot)
        self._nodes[node] = child
        wait_for(node, up.exists)
        up.unlink()
        link = f"v{node}{child.pid}"[:15]
        self.run(
            "bash", "-ec",
            f"ip link add {link} type veth peer name eth0 netns {child.pid}; ip link set {link} master br0 up; "
            f"nsenter -t {child.pid} -n bash -ec 'ip addr add {self.address(node)}/24 dev eth0; ip link set eth0 up'",
        )  # fmt: skip
        linked.touch()

    def kill_node(self, node: str) -> None:
        """Pull the plug of `node`, and let the controller know at once what it would else find out after SlurmdTimeout."""
        self._nodes[node].send_signal(signal.SIGKILL)
        self._nodes[node].wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def run(self, *words: object, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints where the controller is.

        Raises:
            RuntimeError: it fails and `check` is set.
        """
        inside = [word if not word.startswith("--wdns=") or cwd is None else f"--wdns={cwd}" for word in self.inside]
        ended = subprocess.run(
            [*inside, *map(str, words)], env=self.environment | variables, text=True, capture_output=True, timeout=SILENCE
        )
        if check and ended.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: code {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return ended.stdout.strip()

    def idle(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split()

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job as scontrol shows them."""
        words = self.run("scontrol", "-o", "show", "job", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float = SILENCE, moving: Callable[[], object] = lambda: None) -> dict[str, str]:
        """The fields of job `number` when it has ended.

        Raises:
            TimeoutError: nothing about it has moved for `seconds`.
        """
        wait_for(f"the end of job {number}", lambda: self.job(number).get("JobState") in ENDED, seconds, moving)
        return self.job(number)

    def account(self, number: str) -> str:
        """What Slurm knows of job `number` and its nodes, for the message of a test that waited in vain."""
        logs = [path.read_text().splitlines()[-40:] for path in sorted((self.home / "log").glob("slurm*.log"))]
        shown = [self.run("scontrol", "show", "job", number, check=False), self.run("sinfo", "-N", "-l", check=False)]
        return "\n".join([*shown, *(line for lines in logs for line in lines)])

    def __exit__(self, *_: object) -> None:
        if self.inside:
            self.run("scancel", "--signal=KILL", "--full", "-u", "root", check=False)
            self.run("scancel", "-u", "root", check=False)
            with contextlib.suppress(TimeoutError):
                wait_for("no job", lambda: not self.run("squeue", "-h", "-t", "R,CG,PD", check=False), 15)
        for child in reversed(self._children):
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if child in self._nodes.values() else signal.SIGTERM)
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
