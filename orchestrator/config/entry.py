"""The door of a launch script: argv in, exit code out. Help, Hydra's own flags, sweeps, and errors without traceback."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from orchestrator.config.catalog import CONF_DIR
from orchestrator.config.manual import help_text
from orchestrator.config.overrides import check_overrides
from orchestrator.errors import ConfigError, DataError, Fault, MisfitError, ModelError, OrchestratorError

Task = Callable[[list[str]], int]
"""What a launch script does with its overrides; returns the exit code."""

Sweep = Callable[[list[list[str]]], int]
"""What a launch script does with the overrides of all runs of `-m` together; returns the exit code."""

SAME_ON_ALL_RANKS = (ConfigError, DataError, ModelError, MisfitError)
"""Errors of the user's input: every rank meets them alike, so rank 0 speaks for all."""

LOCAL_RANK = re.compile(r"--local[-_]rank(=\d+)?")


def rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` without the --local_rank=N (or --local-rank N) that the DeepSpeed launcher inserts."""
    kept: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        found = LOCAL_RANK.fullmatch(argument)
        if found is None:
            kept.append(argument)
        elif found[1] is None:
            next(arguments, None)
    return kept


def report_error(error: OrchestratorError) -> int:
    """Prints `error` to stderr, once for all ranks where all meet it alike, and returns its exit code."""
    if not isinstance(error, SAME_ON_ALL_RANKS):
        print(error.report() if rank() == 0 else f"rank {rank()}: {error.report()}", file=sys.stderr, flush=True)
    elif rank() == 0:
        print(error.report(), file=sys.stderr, flush=True)
    else:
        # A launcher ends all ranks when the first one fails: rank 0 must have spoken by then.
        time.sleep(1.0)
    return error.exit_code


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's own reading of `argv`, flags allowed anywhere among the overrides."""
    parser: Any = get_args_parser()

    def refuse(message: str) -> None:
        raise ConfigError(Fault("command line", message, "--help lists what can be typed"))

    parser.error = refuse
    arguments: argparse.Namespace = parser.parse_intermixed_args(list(argv))
    for flag in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(arguments, flag) is not None:
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(Fault(name, "this project reads its own conf/ alone", "add a file to a group folder in conf/"))
    return arguments


def _show(argv: Sequence[str], overrides: Sequence[str], program: str, conf_dir: Path) -> int:
    """Lets Hydra print what its flag asks for; nothing is run and no folder is made."""
    if "--shell-completion" not in argv and "-sc" not in argv:  # its arguments are no overrides
        good, _, faults = check_overrides(overrides, conf_dir)
        if faults:
            raise ConfigError(faults)
    else:
        good = list(overrides)
    # Registers the root schema that config.yaml builds on.
    import orchestrator.config.compose  # noqa: F401

    flags = [argument for argument in argv if argument not in overrides]
    before, sys.argv = sys.argv, [program, *flags, *good]
    try:
        hydra.main(config_path=str(conf_dir.resolve()), config_name="config", version_base="1.3")(lambda config: None)()
    except SystemExit as stop:
        return int(stop.code or 0)
    except ValueError as error:  # flags that exclude each other
        raise ConfigError(
            Fault("command line", str(error), "use one of Hydra's flags at a time, and --resolve with --cfg")
        ) from error
    finally:
        sys.argv = before
    return 0


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of `-m`, the last key turning fastest, as Hydra's own sweeper makes them.

    Hydra's sweeper itself is not used: it writes a multirun folder, and hides the exit code of a run.

    Raises:
        ConfigError: an override that cannot be read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(Fault("-m", str(error).splitlines()[0], "write key=value1,value2")) from error
    return [list(run) for batch in batches for run in batch]


def _run_all(task: Task, overrides: Sequence[str]) -> int:
    """One run after the other; the first that fails ends the sweep with its exit code."""
    runs = sweep(overrides)
    for number, run in enumerate(runs, start=1):
        if rank() == 0:
            print(f"[{number}/{len(runs)}] {' '.join(run)}", file=sys.stderr, flush=True)
        code = task(run)
        if code:
            return code
    return 0


def _dispatch(task: Task, argv: Sequence[str], program: str, conf_dir: Path, all_runs: Sweep | None) -> int:
    if {"-h", "--help"} & set(argv):
        if rank() == 0:
            print(help_text(program, conf_dir), end="")
        return 0
    if "--version" in argv and rank() != 0:
        return 0
    arguments = _parsed(argv)
    if arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion or arguments.resolve:
        return _show(argv, arguments.overrides, program, conf_dir) if rank() == 0 else 0
    if arguments.multirun:
        if all_runs is not None:
            return all_runs(sweep(arguments.overrides))
        return _run_all(task, arguments.overrides)
    return task(list(arguments.overrides))


def run_app(
    task: Task,
    argv: Sequence[str] | None = None,
    program: str = "launch/train.py",
    conf_dir: Path = CONF_DIR,
    report: Callable[[OrchestratorError], int] = report_error,
    all_runs: Sweep | None = None,
) -> int:
    """The exit code of `task`, called with the overrides in `argv` (None: this process's), or of what a flag asks for.

    `report` tells a person of an error and returns its exit code. `all_runs` gets the runs of `-m` together; None: `task` gets
    one after the other.
    """
    try:
        code = _dispatch(task, without_local_rank(sys.argv[1:] if argv is None else argv), program, conf_dir, all_runs)
        sys.stdout.flush()
    except OrchestratorError as error:
        return report(error)
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
