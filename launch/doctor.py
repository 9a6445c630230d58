"""Look at this machine before a run: `python launch/doctor.py [ranks=4] [port=29500] [dir=runs,/nvme] [probe=false]`.

Exit code 0: a run can start, 2: something would fail it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config.entry import report_error
from orchestrator.errors import ConfigError, Fault, OrchestratorError

if TYPE_CHECKING:
    from orchestrator.cluster.doctor import Finding


def links(cards: int) -> list[Finding]:
    """What a short probe says about the links of the cards."""
    from orchestrator.cluster.doctor import link
    from orchestrator.train.links import probe_all

    return [link(found.source, found.target, found.gb_per_s, found.exact) for found in probe_all(cards)]


def examine(argv: list[str]) -> int:
    """Look, show, and return the exit code."""
    from orchestrator.cluster import doctor
    from orchestrator.cluster.machine import this_machine
    from orchestrator.report.arguments import choices, positive
    from orchestrator.report.findings import show

    options = {"ranks": (), "port": (), "dir": (), "probe": ("true", "false")}
    defaults = {"ranks": "1", "port": str(doctor.DEFAULT_PORT), "dir": "runs", "probe": "true"}
    values, rest = choices(argv, options, defaults)
    if rest:
        known = ", ".join(f"{name}={value}" for name, value in defaults.items())
        raise ConfigError(Fault(rest[0], "is not understood", f"valid: {known}"))
    machine = this_machine([Path(folder).expanduser() for folder in values["dir"].split(",")])
    ranks = positive(values, "ranks") if any(word.startswith("ranks=") for word in argv) else 0
    findings = doctor.examine(machine, doctor.Need(ranks=ranks))
    findings.append(doctor.port(positive(values, "port")))
    if machine.cards and machine.torch_cuda and values["probe"] == "true":
        findings += links(len(machine.cards))
    findings = doctor.ordered(findings)
    show(findings)
    return ConfigError.exit_code if doctor.fails(findings) else 0


if __name__ == "__main__":
    try:
        sys.exit(examine(sys.argv[1:]))
    except OrchestratorError as error:
        sys.exit(report_error(error))
