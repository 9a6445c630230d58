"""Publishing a run: gather, write, reopen with the real library, compare, and only then give the export its name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from orchestrator.engine.protocol import Engine, Weights
from orchestrator.model.quantised import rounded
from orchestrator.spec import Parameter, RunSpec
from orchestrator.train import export
from orchestrator.train.export import Checksums, Source
from orchestrator.train.world import World
from orchestrator.units import TORCH_NAMES


@dataclass(frozen=True, slots=True)
class Publisher:
    """Everything an export is made from besides the trained tensors. `table` is the module's, `weights` the initial ones.
    `trained`: token ids and the trained model's logits for them, that a merged model is held to."""

    spec: RunSpec
    world: World
    source: Source
    table: Sequence[Parameter]
    weights: Weights
    tokenizer: Any
    trained: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self.spec.precision.compute])
        return dtype

    def write(self, engine: Engine, folder: Path) -> Path:
        """Gather the trained tensors of `engine` and write the export beside `folder`; the path where it waits for `confirm`.

        Every rank calls it, since gathering takes them all; rank 0 alone holds data and writes.

        Raises:
            CheckpointError: the disk refused; nothing of the export is left.
        """
        waiting = folder.with_name(f".tmp-{folder.name}")
        tensors = engine.full_tensors()
        failure: Exception | None = None
        if self.world.first:
            try:
                shutil.rmtree(waiting, ignore_errors=True)
                waiting.mkdir(parents=True)
                self._write(waiting, folder, tensors)
            except (OSError, SafetensorError) as error:
                failure = export.failed(waiting, error)
        for _ in tensors:  # the peers' side of each gather, and the rest of rank 0's after a failure
            pass

        def outcome() -> Path:
            if failure is not None:
                raise failure
            return waiting

        return self.world.on_first(outcome)

    def _write(self, waiting: Path, final: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        spec = self.spec
        if not spec.tuning.adapters:
            whole = tensors
            if spec.tuning.kind != "full":
                whole = export.replaced(self._base_tensors(as_trained=True), dict(tensors))
            self._note(waiting, self._write_model(waiting, whole))
            return
        adapters = {export.adapter_name(name): tensor.detach().clone() for name, tensor in tensors}
        base = str((final / "base").resolve()) if spec.model.path is None else _absolute(spec.model.path)
        self._note(waiting, export.write_adapter(waiting, adapters.items(), self.source.adapter, base))
        self.tokenizer.save_pretrained(waiting)
        if spec.tuning.form:
            export.write_quantisation(waiting, spec.tuning.form, self._dtype)
        if spec.model.path is None:
            (waiting / "base").mkdir()
            self._note(waiting / "base", self._write_model(waiting / "base", self._base_tensors()))
        if spec.export.merge:
            (waiting / "merged").mkdir()
            whole = export.merged(self._base_tensors(as_trained=True), adapters, self._scaling)
            self._note(waiting / "merged", self._write_model(waiting / "merged", whole))

    def _write_model(self, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Checksums:
        sums = export.write_model(folder, tensors)
        native = self.spec.model.path is not None and self.spec.data.tokenizer is None
        export.state_special_tokens(self.source, self.tokenizer, native=native)
        export.write_config(folder, self.source, self._dtype)
        self.tokenizer.save_pretrained(folder)
        return sums

    @staticmethod
    def _note(folder: Path, sums: Checksums) -> None:
        export.write_checksums(folder, sums)

    @property
    def _scaling(self) -> float:
        return self.spec.tuning.scaling

    def _base_tensors(self, *, as_trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The base model's tensors under their own names in the compute dtype, one at a time, as they were loaded;
        `as_trained`: quantised ones as the adapters have known them, dequantised."""
        for parameter in self.table:
            if not parameter.adapter:
                flat = self.weights.read(parameter.name, 0, math.prod(parameter.shape))
                tensor = flat.view(parameter.shape).to(self._dtype)
                if as_trained and parameter.quant:
                    tensor = rounded(tensor, parameter.quant, self.world.device)
                yield export.base_name(parameter.name), tensor

    def confirm(self, waiting: Path, folder: Path) -> tuple[Path, str | None]:
        """(`folder`, how far the merged model is from the trained one). Reopens what `write` left with transformers or PEFT,
        compares every tensor, and renames it to `folder`.

        An older export of the run is kept as `export.old`, `export.old2`, …. Call it on rank 0 when the engine is closed.

        Raises:
            CheckpointError: a tensor that the library loads is not the one that was gathered.
        """
        from orchestrator.train import reopen

        trust = self.spec.model.trust_remote_code
        reopen.check(waiting, trust_remote_code=trust)
        merge: str | None = None
        if self.trained is not None:
            ids, expected = self.trained
            found = reopen.logits_of(waiting / "merged", ids, trust)
            merge = difference(found, expected)
        if folder.exists():
            aside, number = folder.with_name(f"{folder.name}.old"), 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{folder.name}.old{number}")
            folder.rename(aside)
        waiting.rename(folder)
        return folder, merge


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How far two sets of logits (… × vocabulary) are apart, beside how far they spread, in one line."""
    apart, spread = (found - expected).abs(), float(expected.std())
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return (
        f"its logits are {float(apart.mean()):.2g} from the trained model's on average, {float(apart.max()):.2g} at most, "
        f"where they spread by {spread:.2g}; the likeliest token is the same in {same:.0%}"
    )


def _absolute(path: str) -> str:
    """A local model folder as an absolute path; a hub id as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.is_dir() else path
