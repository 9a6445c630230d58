"""Loss spikes: found by what the losses before them were, and gone back from.

After a spike PaLM went back to a checkpoint from before it and left out the batches around it, and it did not return; the same
batches after another checkpoint made none (arXiv:2204.02311, section 5.1). The rule is the modified z-score of Iglewicz and
Hoaglin ("How to Detect and Handle Outliers", 1993): the distance from the median in units of 1.4826 × the median absolute
deviation, which a few outliers do not move. They take 3.5 to label an outlier; a step back costs training, so 10 is usual here.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.engine.protocol import Engine
from orchestrator.errors import Fault
from orchestrator.spec import Health
from orchestrator.train.folder import RunFolder
from orchestrator.train.health import Diverged
from orchestrator.train.metrics import Metrics
from orchestrator.train.resume import Reader, bring_back, first_sound
from orchestrator.train.world import World

DEVIATION = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

LEAST_DEVIATION = 0.01
"""Of the median: losses that hardly differ must not make a spike of their noise."""

ENOUGH = 16
"""Losses before the first judgement, or `spike_window` where that is less."""


@dataclass(frozen=True, slots=True)
class Spike:
    """The loss of `step`, and the `limit` that it is above: so many deviations over the `median` of the steps before."""

    step: int
    loss: float
    median: float
    limit: float


class Spikes:
    """The losses of the last steps and the steps left out. Every rank is given the same losses, and judges alike."""

    def __init__(self, health: Health, saved: Mapping[str, Any]) -> None:
        self._health, self.most = health, health.spike_limit
        self._losses: list[tuple[int, float]] = [(int(step), float(loss)) for step, loss in saved.get("losses", ())]
        self.skipped: tuple[int, ...] = tuple(saved.get("skipped", ()))

    def judge(self, step: int, loss: float) -> Spike | None:
        """The spike that the finite `loss` of `step` is; one that is none counts as usual from now on."""
        if self._health.on_spike != "rollback":
            return None
        before = [known for _, known in self._losses]
        if len(before) >= min(ENOUGH, self._health.spike_window):
            median = statistics.median(before)
            deviation = DEVIATION * statistics.median(abs(known - median) for known in before)
            limit = median + self._health.spike_deviations * max(deviation, LEAST_DEVIATION * median)
            if loss > limit:
                return Spike(step, loss, median, limit)
        self._losses = [*self._losses, (step, loss)][-self._health.spike_window :]
        return None

    def accept(self, spike: Spike) -> None:
        """Take its loss for usual after all."""
        self._losses = [*self._losses, (spike.step, spike.loss)][-self._health.spike_window :]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, empty where there is nothing."""
        kept = {"losses": [list(pair) for pair in self._losses], "skipped": list(self.skipped)}
        return {name: value for name, value in kept.items() if value}

    def leave_out(self, spike: Spike, back_to: int, known: Mapping[str, Any]) -> None:
        """Forget what came after step `back_to`, whose checkpoint has `known` these losses, and the samples of the spike.

        Raises:
            Diverged: there were too many before.
        """
        if len(self.skipped) >= self._health.spike_limit:
            gone = ", ".join(map(str, self.skipped))
            problem = f"step {spike.step} is a spike ({spike.loss:.4g}, limit {spike.limit:.4g}), after those of steps {gone}"
            remedy = "lower optimizer.lr, look at the data, or raise health.spike_limit; the last checkpoint is from before it"
            raise Diverged(Fault("loss", problem, remedy))
        self._losses = [(int(step), float(loss)) for step, loss in known.get("losses", ()) if step <= back_to]
        self.skipped = (*self.skipped, spike.step)


class WayBack:
    """The checkpoints that this process has written or begun from, and the step back to the newest of them."""

    def __init__(self, engine: Engine, world: World, folder: RunFolder, spikes: Spikes, say: Callable[[str], None]) -> None:
        self._engine, self._world, self._folder, self._spikes, self._say = engine, world, folder, spikes, say
        self._known: list[Path] = []

    def know(self, checkpoint: Path) -> None:
        """A checkpoint of this training has been saved or read."""
        self._known.append(checkpoint)

    def take(self, spike: Spike, metrics: Metrics | None) -> tuple[int, int] | None:
        """(step, epoch) of the checkpoint to which all is brought back: weights, optimizer, random states, losses, metrics;
        None where there was none to go back to. Every rank calls it.

        Raises:
            Diverged: there were too many spikes.
            CheckpointError: no checkpoint is sound any more.
        """
        kept = self._world.on_first(lambda: tuple(path for path in reversed(self._known) if path.exists()))
        chosen = first_sound(kept, self._world, self._say)
        numbers = f"{spike.loss:.4g}, where {spike.median:.4g} is usual and {spike.limit:.4g} the limit"
        what = f"the loss of step {spike.step} is {numbers}"
        if chosen is None:
            self._spikes.accept(spike)
            self._say(f"spike    {what}; no checkpoint was there to go back to, so it goes on")
            return None
        reader = Reader(chosen)
        self._spikes.leave_out(spike, reader.step, reader.health)
        bring_back(self._engine, reader, self._world)
        if metrics is not None:
            metrics.rewind(reader.step)
        count = f"{len(self._spikes.skipped)} of at most {self._spikes.most}"
        self._say(f"spike    {what}; back to step {reader.step}, without the samples of step {spike.step} ({count})")
        self._world.on_first(lambda: self._audit(spike, chosen))
        return reader.step, reader.epoch

    def _audit(self, spike: Spike, chosen: Path) -> None:
        line = {"time": time.time(), "event": "rollback", **asdict(spike), "checkpoint": str(chosen)}
        with self._folder.audit.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"skipped": self._spikes.skipped}) + "\n")
