"""One rank of a run of this project that takes its steps in turns with other jobs: torchrun ours.py OPTIONS key=value …"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]


def main(options: dict[str, Any], words: list[str]) -> None:
    from turns import Turns

    from orchestrator import data
    from orchestrator.cluster.local import local_cluster
    from orchestrator.config import compose
    from orchestrator.data.batch import IGNORED
    from orchestrator.planner.prelude import settle
    from orchestrator.train.run import Run
    from orchestrator.train.world import join

    turns = Turns(Path(options["turns"]), options["name"], options["steps"])
    spec = compose(words, ranks=int(os.environ["WORLD_SIZE"]), local=local_cluster, strict=False)
    world = join(spec.cluster.card.name)
    prelude = world.on_first(lambda: settle(spec))
    ours = data.steps

    def stepping(*arguments: Any, **named: Any) -> Iterator[Any]:
        turns.begin()
        for batch in ours(*arguments, **named):
            yield batch
            # Ranks of one tensor-parallel group work on the same samples: the first counts them.
            mine = batch.micro_batches if world.rank % prelude.spec.strategy.tp == 0 else ()
            own = sum(int((micro.labels[:, 1:] != IGNORED).sum()) for micro in mine)
            tokens = batch.tokens if world.first else 0  # those of all ranks
            turns.border(own, tokens, sum(micro.input_ids.numel() for micro in mine))

    data.steps = stepping
    Run(prelude.spec, world).execute()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
