"""One run from a spec to an export: everything is joined here and nothing is done here."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from orchestrator import data
from orchestrator.data.batch import StepBatch
from orchestrator.engine import Engine, make
from orchestrator.errors import CheckpointError, ConfigError, DataError, Fault, ModelError
from orchestrator.layout import LOADED, STEPPED, Layout, Row, check_census, lay_out, lower, saved_bytes
from orchestrator.model import build, loss_sum, open_weights, table_of
from orchestrator.spec import Parameter, RunSpec, digest
from orchestrator.train import checkpoint, failure, folder
from orchestrator.train.display import Display, count, home_word
from orchestrator.train.export import Source
from orchestrator.train.folder import Choice, RunFolder, write_json, write_text
from orchestrator.train.identity import course, identity
from orchestrator.train.log import open_log, quiet_libraries
from orchestrator.train.loop import Ending, Loop
from orchestrator.train.meeting import check_alike
from orchestrator.train.memory import Memory, measure
from orchestrator.train.metrics import Metrics, drop_after, open_tracker
from orchestrator.train.probe import Probe, probe_ids
from orchestrator.train.publish import Publisher
from orchestrator.train.renewal import Renewal
from orchestrator.train.resume import Reader, bring_back, changes, check_run, check_tensors, first_sound, seed_rank
from orchestrator.train.saving import Saved, Saver
from orchestrator.train.shortage import EXPORT, LOAD, RESUME, Rescue, Shortage, row_json
from orchestrator.train.spikes import Spikes, WayBack
from orchestrator.train.stop import StopRequest, listening
from orchestrator.train.watch import SAVE, Watch
from orchestrator.train.world import World
from orchestrator.units import format_bytes, format_count, format_seconds

LOG = logging.getLogger("orchestrator.train")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has come to. `export` None: none was asked for, or the run was stopped before its last step."""

    folder: RunFolder
    step: int
    total: int
    stopped: bool
    export: Path | None


class Run:
    """A run of `spec` in `world`. `stop` is a request that may come before the run listens itself, which it does from its
    first step to its last. `renew` replaces this process by one that runs its command again, where a process may be."""

    def __init__(
        self, spec: RunSpec, world: World, display: Display | None = None, stop: StopRequest | None = None,
        renew: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.world, self._renew = spec, world, renew
        self._stop = StopRequest() if stop is None else stop
        self.display = display or Display(world.first)
        self.folder: RunFolder | None = None
        self._made = False
        self._measured: dict[str, tuple[Row, ...]] = {}
        self._choice: Choice
        self._layout: Layout
        self._table: tuple[Parameter, ...]
        self._expected_bytes = 0
        self._metrics: Metrics | None = None
        self._saver: Saver | None = None
        self._probe = Probe(loss_sum)

    def execute(self, on_open: Callable[[RunFolder], None] = lambda folder: None) -> Outcome:
        """Train to the last step, save, export, and account for the memory. `on_open` learns of the folder once it is there.

        Raises:
            OrchestratorError: anything that a person can mend; every rank raises.
        """
        with ExitStack() as leaving:
            leaving.push(self._withdraw)
            reader = self._open()
            on_open(self._folder)
            tokenizer, prepared, total = self._prepare()
            engine, model, source, weights = self._adopt()
            leaving.callback(engine.close)
            if reader is not None:
                with self._shortage(engine).caught(RESUME):
                    self._load(engine, reader)
            started = reader.step if reader is not None else 0
            self._introduce(prepared, total, started)
            told = changes(reader, course(self.spec, prepared)) if reader is not None else []
            for sentence in told:
                self.display.note(f"         {sentence}")
            spikes = Spikes(self.spec.health, reader.health if reader is not None and not told else {})
            ending = self._train(engine, prepared, tokenizer, total, started, spikes)
            done = ending.step if ending is not None else started
            stopped = ending is not None and ending.stopped
            if ending is not None:  # else what the finished run measured stands
                self._account(None)
            publisher = Publisher(self.spec, self.world, source, self._table, weights, tokenizer)
            wanted = self.spec.export.format != "none" and not stopped
            with self._shortage(engine).caught(EXPORT):
                if wanted and self.spec.export.merge:
                    publisher = replace(publisher, trained=self._logits(engine))
                waiting = publisher.write(engine, self._folder.export) if wanted else None
        del engine, model
        published = self._confirm(publisher, waiting)
        self.world.on_first(lambda: self._mark(done, total, stopped))
        return Outcome(self._folder, done, total, stopped, published)

    def _mark(self, done: int, total: int, stopped: bool) -> None:
        """Leave the file by which a job script knows how the run ended, when everything else is written."""
        self._folder.tidy()
        if stopped:
            write_text(self._folder.stopped, f"{self._stop.signal_name or 'a signal'} after step {done} of {total}\n")
        else:
            write_text(self._folder.done, f"step {done} of {total}\n")

    def conclude(self, outcome: Outcome) -> None:
        """Say how the run ended and what to do next."""
        path, note = outcome.folder.path, self.display.note
        if outcome.stopped:
            note(f"stopped by a signal after step {outcome.step} of {outcome.total}; go on with resume=auto run.dir={path}")
        elif outcome.export is not None:
            note(f'done     try it: python launch/ask.py run={path} "a prompt"')
        else:
            note(f"done     {path}")

    @property
    def _folder(self) -> RunFolder:
        assert self.folder is not None, "the folder is chosen first"
        return self.folder

    def _withdraw(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Take away the folder that this run has made if the user's input was refused before anything stood in it."""
        refused = isinstance(error, (ConfigError, DataError, ModelError))
        if refused and self._made and self.folder is not None and not self.folder.has_run():
            shutil.rmtree(self.folder.path, ignore_errors=True)
        return False

    def _open(self) -> Reader | None:
        """Choose and open the run folder; the checkpoint to resume from, checked against the spec."""
        spec, world = self.spec, self.world

        choice = world.on_first(lambda: folder.choose(spec))
        sound = first_sound(choice.candidates, world, self.display.note)
        self._choice = choice = Choice(choice.folder, (sound,) if sound is not None else ())

        def open_it() -> bool:
            resumed_at: int | None = None
            if choice.checkpoint is not None:
                reader = Reader(choice.checkpoint)
                check_run(reader, identity(spec))
                resumed_at = reader.step
            elif choice.folder.has_run():
                resumed_at = 0
            self._made = not choice.folder.path.exists()
            folder.open_folder(choice.folder, spec, lower(spec), resumed_at)
            self.folder = choice.folder
            if resumed_at is not None and spec.resume != "none":
                drop_after(choice.folder.metrics, resumed_at)
            self._metrics = Metrics(choice.folder.metrics, open_tracker(spec.logging.tracker, choice.folder.path))
            return True

        world.on_first(open_it)
        self.folder = choice.folder
        open_log(self.folder.log, world.rank)
        world.barrier()  # rank 0 may take the folder away again
        seed_rank(spec.seed, world.rank)
        return Reader(choice.checkpoint) if choice.checkpoint is not None else None

    def _prepare(self) -> tuple[Any, Any, int]:
        """(tokenizer, prepared data, total optimizer steps). Rank 0 tokenises while the others wait, then all open it; on a
        machine that does not share its cache, the first rank there tokenises again."""
        spec = self.spec
        cache = data.cache_folder()

        def load() -> tuple[Any, Any]:
            tokenizer = data.load_tokenizer(spec.data, spec.model.path, trust_remote_code=spec.model.trust_remote_code)
            return tokenizer, data.prepare(spec.data, tokenizer, spec.seed, cache, self.display.preparing)

        def first() -> bool:
            self._loaded = load()
            return True

        self.world.on_first(first)
        if not self.world.first and self.world.local_rank == 0:
            first()
        self.world.barrier()
        tokenizer, prepared = self._loaded if self.world.local_rank == 0 else load()
        vocabulary = self.spec.model.shape.vocab_size if self.spec.model.shape is not None else None
        if vocabulary is not None:
            data.check_vocabulary(prepared, vocabulary)
        check_alike(self.world.gather((self.world.host, {"data": prepared.digest})))
        LOG.info("data: %s", prepared.report.sentence())
        per_epoch = data.steps_per_epoch(prepared, spec.batch)
        total = spec.run.steps if spec.run.steps is not None else spec.run.epochs * per_epoch
        return tokenizer, prepared, total

    def _adopt(self) -> tuple[Engine, nn.Module, Source, Any]:
        """Build the module inside the engine's context, hand it over, and hold the live tensors to the layout."""
        spec, world = self.spec, self.world
        engine = make(spec, world.device, self._probe)
        model = build(spec, engine.building())
        source = Source.of(model)
        self._table = table_of(model)
        self._layout = lay_out(spec, self._table, world.rank)
        weights = open_weights(spec, self._table)
        with self._shortage(None).caught(LOAD):
            engine.adopt(model, weights)
        quiet_libraries()
        self._expected_bytes = saved_bytes(spec.optimizer, [p for p in self._table if p.trainable])
        self._census(engine, LOADED)
        return engine, model, source, weights

    def _shortage(self, engine: Engine | None) -> Shortage:
        """What to do where memory ends; `engine` None: it does not hold all of its tensors yet."""
        return Shortage(self.spec, self.world, self._folder, self._layout, engine)

    def _census(self, engine: Engine, point: str) -> None:
        """Compare what lives on this rank with the layout.

        Raises:
            LayoutDrift: they differ.
        """
        self._measured[point] = engine.census()
        check_census(self._layout, self._measured[point], point)

    def _load(self, engine: Engine, reader: Reader) -> None:
        """Bring the engine to where the checkpoint left off.

        Raises:
            CheckpointError: its tensors are not this model's.
        """
        pieces, _ = engine.save()
        failures = self.world.agree(check_tensors(reader, pieces))
        if failures:
            problem = failures[0].partition(": ")[2]
            raise CheckpointError(Fault("resume", problem, "resume with the model and tuning that it was saved with"))
        bring_back(engine, reader, self.world)

    def _introduce(self, prepared: Any, total: int, started: int) -> None:
        """Say in a few lines what runs where."""
        spec, note = self.spec, self.display.note
        trained = sum(p.numel for p in self._table if p.trainable)
        every = sum(p.numel for p in self._table)
        note(f"run      {self._folder.path}")
        note(
            f"model    {spec.model.name}, {format_count(every)} parameters, "
            f"{format_count(trained)} trained ({spec.tuning.kind})"
        )
        ranks = f"{count(self.world.size, 'rank')} on {self.world.device.type}"
        note(f"strategy {spec.strategy.label}, {ranks}, {spec.precision.compute}, {spec.optimizer.name}")
        if spec.loss.kind == "plain":
            note("loss     from whole logits: loss.kind=plain, or a family that may change them after its head")
        alike = f" of {spec.strategy.tp} ranks" if spec.strategy.tp > 1 else ""  # which compute the same samples together
        learners = count(spec.strategy.dp, "group" if alike else "rank") + alike
        product = f"{spec.batch.micro} × {count(spec.batch.accumulation, 'forward')} × {learners}"
        rows = data.rows_of(prepared)
        packed = spec.data.packing != "none"
        unit = "rows" if packed else "samples"
        held = f"{len(prepared.train)} samples"
        if packed:
            held += f" packed into {len(rows)} rows of {spec.data.seq_len} tokens, {rows.fill(spec.data.seq_len):.1%} full"
        note(f"data     {prepared.report.sentence()}")
        note(f"batch    {spec.batch.global_size} {unit} a step = {product}; {held}, {len(prepared.eval)} held out")
        for row in self._layout.at(STEPPED):
            home = home_word(row.home, spec.cluster.card.name)
            LOG.info("at rest on rank 0: %s %s %s %s", row.line, row.dtype, home, format_bytes(row.bytes))
        if started:
            note(f"resume   after step {started} of {total}, from {self._choice.checkpoint}")
            if started >= total:
                note(f"         nothing is left to do: raise run.steps above {started} to go on")

    def _train(
        self, engine: Engine, prepared: Any, tokenizer: Any, total: int, started: int, spikes: Spikes
    ) -> Ending | None:  # fmt: skip
        spec, world = self.spec, self.world
        dp_rank, ranks = world.rank // spec.strategy.tp, spec.strategy.dp
        pad = data.choose_pad_id(tokenizer)
        held_out: Callable[[], Any] | None = None
        if spec.eval.every and len(prepared.eval):
            held_out = partial(data.eval_batches, prepared, spec.batch.micro, dp_rank, ranks, pad)
        watch = Watch(world, spec.run.timeout, self._folder.log)
        renewal: Renewal | None = None
        if self._renew is not None and spec.health.on_oom == "halve":
            renewal = Renewal(spec, world, self._folder.path, self._renew)
        way_back = WayBack(engine, world, self._folder, spikes, self.display.note)
        if self._choice.checkpoint is not None:
            way_back.know(self._choice.checkpoint)

        def saved(done: Saved) -> None:
            way_back.know(done.path)
            self._saved(done)

        self._saver = saver = Saver(world, saved, background=spec.checkpoint.background)

        def save(step: int, epoch: int) -> None:
            moment = checkpoint.Moment(
                step, epoch, spec.seed, digest(spec), identity(spec), course(spec, prepared), spikes.to_json()
            )
            pieces, scalars = engine.save()
            write = partial(
                checkpoint.save, self._folder.checkpoints, moment, scalars=scalars,
                keep=spec.checkpoint.keep, expected_bytes=self._expected_bytes,
            )  # fmt: skip
            saver.save(pieces, write)

        rescue = Rescue(self._shortage(engine), renewal, saver, save, started)
        loop = Loop(
            engine, spec, world, total, self._metrics, self.display, spikes=spikes, eval_batches=held_out,
            on_memory=self._remember, on_memory_end=rescue.meet, at=watch.at,
        )  # fmt: skip

        def after_first() -> None:
            self._census(engine, STEPPED)
            self._account(None)

        def steps_from(first: int) -> Generator[StepBatch]:
            return data.steps(
                prepared, spec.batch, seed=spec.seed, rank=dp_rank, ranks=ranks, pad_id=pad, start_step=first,
                total_steps=total, skipped={step - 1 for step in spikes.skipped},
            )  # fmt: skip

        self.display.begin(started, total)
        try:
            with listening(self._stop) as stop, rescue.caught(lambda: watch.place):
                while True:
                    with closing(steps_from(started)) as steps:
                        ending = loop.run(steps, stop, save, after_first)
                    saver.wait()
                    if ending is None or ending.spike is None:
                        return ending
                    watch.at(ending.step, SAVE)
                    back = way_back.take(ending.spike, self._metrics)
                    started = ending.step if back is None else back[0]
                    if back is not None:
                        save(*back)  # the same state, and from now on the samples that are left out
        except BaseException as error:
            failure.notice(error, world)
            raise
        finally:
            saver.settle()
            if renewal is not None:
                renewal.close()
            watch.close()
            self.display.end()
            if self._metrics is not None:
                self._metrics.close()

    def _saved(self, saved: Saved) -> None:
        stalled = f"; training stood still for {format_seconds(saved.stall_seconds)}" if self.spec.checkpoint.background else ""
        size = format_bytes(saved.bytes)
        self.display.note(f"saved    {saved.path} ({size} in {format_seconds(saved.seconds)}{stalled})")

    def _logits(self, engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, logits of the trained model for them)."""
        embedding = next(p for p in self._table if p.block < 0 and len(p.shape) == 2)
        ids = probe_ids(embedding.shape[0], self.spec.seed)
        return ids, self._probe.logits(engine, ids)

    def _remember(self, step: int, ranks: list[Memory]) -> None:
        self._account(ranks)
        if self._saver is not None:
            self._saver.poll()

    def _account(self, memory: list[Memory] | None) -> None:
        """Write ledger.json: for each rank the rows that the layout predicts, those that were found, and the memory so far."""
        world = self.world
        ranks = memory or world.gather(measure(world.rank, world.device))
        own = {
            "rank": world.rank,
            "predicted": [row_json(row) for row in self._layout.rows if row.elements],
            "buffers": [asdict(buffer) | {"home": str(buffer.home)} for buffer in self._layout.buffers if buffer.bytes],
            "measured": {point: [row_json(row) for row in rows] for point, rows in self._measured.items()},
        }
        accounts = world.gather(own)
        if world.first:
            for account, held in zip(accounts, ranks, strict=True):
                account["memory"] = held.to_json()
            write_json(self._folder.ledger, {"strategy": self.spec.strategy.label, "ranks": accounts})

    def _confirm(self, publisher: Publisher, waiting: Path | None) -> Path | None:
        if waiting is None:
            return None
        path, merge = self.world.on_first(lambda: publisher.confirm(waiting, self._folder.export))
        self.display.note(f"export   {path}, reopened and compared")
        if merge is not None:
            self.display.note(f"merged   {merge}")
        return path
