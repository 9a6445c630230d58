"""Show a run again from its folder: `python launch/report.py run=runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.errors import ConfigError, Fault, OrchestratorError


def main(argv: list[str]) -> int:
    """Print the tables of the run that `argv` names; the exit code."""
    from orchestrator.report.arguments import read_arguments
    from orchestrator.report.record import load
    from orchestrator.report.tables import print_report

    try:
        values, rest = read_arguments(argv, {"run": ""})
        if rest:
            raise ConfigError(Fault(rest[0], "is not understood", "write python launch/report.py run=runs/demo"))
        print_report(load(Path(values["run"]).expanduser()))
    except OrchestratorError as error:
        print(error.report(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
