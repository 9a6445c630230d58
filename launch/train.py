"""Train: `python|torchrun|deepspeed launch/train.py [group=choice] [key=value] …`; --help lists them all.

`spec=runs/NAME/job/submitted.json` instead runs what launch/submit.py has planned, to the letter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# This clone, also where another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config import compose, run_app
from orchestrator.config.entry import report_error
from orchestrator.errors import OrchestratorError
from orchestrator.train.launcher import Ending

if TYPE_CHECKING:
    from orchestrator.train.world import World


def train(overrides: list[str]) -> int:
    """Compose, join the other ranks, run, and show what became of it. Torch is imported when the configuration is sound."""
    from orchestrator.train import failure, submission
    from orchestrator.train.launcher import ranks_from_environment
    from orchestrator.train.stop import OF_A_JOB, StopRequest, listening

    log: Path | None = None
    world: World | None = None
    saved = submission.path_in(overrides)
    stop = StopRequest()

    def work() -> int:
        nonlocal log, world
        from orchestrator.cluster.local import local_cluster

        ranks = ranks_from_environment()[0]
        if saved is not None:
            spec = submission.load(saved, ranks)
        else:
            spec = compose(overrides, ranks=ranks, local=local_cluster, strict=False)
        from orchestrator.train import renewal

        spec = renewal.renewed(spec)
        from orchestrator.planner.predict import table_for
        from orchestrator.planner.prelude import settle
        from orchestrator.report.record import load
        from orchestrator.report.tables import print_report
        from orchestrator.train import preflight
        from orchestrator.train.folder import RunFolder, write_json
        from orchestrator.train.meeting import facts
        from orchestrator.train.run import Run
        from orchestrator.train.world import join, leave

        world = join(spec.cluster.card.name, facts(spec))
        prelude = world.on_first(lambda: settle(spec))
        warnings = preflight.look(prelude.spec, lambda: table_for(prelude.spec), world)
        run = Run(prelude.spec, world, stop=stop, renew=renewal.replace_process)
        if prelude.spec.strategy.nvme is not None:
            from orchestrator.layout import lay_out
            from orchestrator.planner.traffic import traffic
            from orchestrator.train import disk

            table = table_for(prelude.spec)
            moved = traffic(prelude.spec, table)
            layout = lay_out(prelude.spec, table)
            disk.prepare(prelude.spec.strategy.nvme, layout, (moved.disk_read, moved.disk_written), world, run.display.note)

        def opened(folder: RunFolder) -> None:
            nonlocal log
            log = folder.log
            if world.first:
                write_json(folder.plan, prelude.plan.to_json())
                for line in (*renewal.words(prelude.spec), *prelude.lines, *warnings):
                    run.display.note(line)

        outcome = run.execute(on_open=opened)
        if world.first:
            if outcome.folder.metrics.stat().st_size:  # a resumed run may have had nothing left to do
                print_report(load(outcome.folder.path), over=False)
            run.conclude(outcome)
        leave()
        return 0

    with listening(stop, OF_A_JOB if saved is not None else ()):
        return failure.guarded(work, lambda: log, lambda: world)


def tell(error: OrchestratorError) -> int:
    """Tell of an error that was met before `train` as one within it: last on the screen under a launcher."""
    if "RANK" not in os.environ:
        return report_error(error)
    from orchestrator.train import failure

    return failure.report(error, None)


if __name__ == "__main__":
    ending = Ending()
    ending.code = run_app(train, report=tell)
    sys.exit(ending.code)
