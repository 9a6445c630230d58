"""Two hosts on one machine: each has network, host name, /etc/hosts and SSH of its own, and a cable joins them. Root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("unshare", "nsenter", "ip")
NAMES = ("h1", "h2")
ADDRESSES = {"h1": "10.98.0.1", "h2": "10.98.0.2"}
PATIENCE = 60.0


def missing(programs: tuple[str, ...] = PROGRAMS) -> str:
    """Why there can be no two hosts; "" where they can."""
    if os.geteuid() != 0:
        return "two hosts on one machine need root"
    lacking = [name for name in programs if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    if subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True).returncode:
        return "this container may not make namespaces"
    return ""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} within {PATIENCE:.0f} s"
        time.sleep(0.02)


class TwoHosts:
    """Use it as a context. `start` begins a command on a host."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._children: list[subprocess.Popen[bytes]] = []
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoHosts:
        (self.home / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[name]} {name}\n" for name in NAMES))
        ssh = Path("~/.ssh").expanduser()
        ssh.mkdir(mode=0o700, exist_ok=True)
        (self.home / "ssh").mkdir(mode=0o700)
        try:
            for name in NAMES:
                up = self.home / f"{name}.up"
                boot = (
                    f"hostname {name}; mount --bind '{self.home}/hosts' /etc/hosts; mount --bind '{self.home}/ssh' '{ssh}'; "
                    f"ip link set lo up; touch '{up}'; exec sleep infinity"
                )
                self._holders[name] = self._child("unshare", "--net", "--mount", "--uts", "bash", "-ec", boot)
                wait_for(up)
            pids = {name: str(holder.pid) for name, holder in self._holders.items()}
            cable = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pids["h2"])
            self.run("h1", *cable)
            for name in NAMES:
                self.run(name, "ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
                self.run(name, "ip", "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _child(self, *words: object, **options: object) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([str(word) for word in words], start_new_session=True, **options)
        self._children.append(child)
        return child

    def _inside(self, host: str) -> list[str]:
        return ["nsenter", "-t", str(self._holders[host].pid), "-n", "-m", "-u", f"--wdns={self.home}"]

    def run(self, host: str, *words: object) -> None:
        """A short command on `host`.

        Raises:
            CalledProcessError: it fails.
        """
        subprocess.run([*self._inside(host), *map(str, words)], check=True, capture_output=True, timeout=PATIENCE)

    def start(self, host: str, *words: object, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """A command on `host` that goes on; what it prints goes to `log`."""
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in dropped} | variables
        with log.open("ab") as file:
            return self._child(*self._inside(host), *words, stdout=file, stderr=file, env=environment)

    def open_ssh(self) -> None:
        """Let each host log in to the other, and to itself, with keys of their own."""
        ssh = self.home / "ssh"
        for name in ("id_ed25519", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True, timeout=PATIENCE)
        (ssh / "authorized_keys").write_text((ssh / "id_ed25519.pub").read_text())
        (ssh / "config").write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in NAMES:
            words = ("-D", "-e", "-f", "/dev/null", "-h", ssh / "host_key", "-o", "PidFile=none", "-o", "StrictModes=no",
                     "-o", f"AuthorizedKeysFile={ssh}/authorized_keys")  # fmt: skip
            self.start(name, shutil.which("sshd") or "/usr/sbin/sshd", *words, log=self.home / f"{name}.sshd")
        deadline = time.monotonic() + PATIENCE
        for name in NAMES:
            while subprocess.run([*self._inside("h1"), "ssh", name, "true"], capture_output=True, timeout=PATIENCE).returncode:
                assert time.monotonic() < deadline, (self.home / f"{name}.sshd").read_text()
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            if child.poll() is None:
                child.terminate() if child not in self._holders.values() else child.kill()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def binary(name: str) -> Path:
    """A program of the environment that runs the tests."""
    return Path(sys.executable).parent / name
