"""Initial values of parameters, read a slice at a time, so that no rank holds more than it keeps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.errors import Fault, ModelError
from orchestrator.model.dora import is_magnitude, lengths, rows_of
from orchestrator.model.location import resolve
from orchestrator.spec import EMBEDDING, HEAD, Parameter, RunSpec
from orchestrator.units import TORCH_NAMES


def base_name(name: str) -> str:
    """The name in a checkpoint of a parameter of a PEFT-wrapped module: without PEFT's prefix and ".base_layer"."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


Columns = tuple[int, int] | None
"""Columns [first, last) of whole rows; None: all of them."""


class _Source(Protocol):
    def read(self, name: str, start: int, stop: int, columns: Columns = None) -> torch.Tensor: ...


def _cut(rows: torch.Tensor, width: int, columns: Columns) -> torch.Tensor:
    """Only `columns` of each of the flattened `rows` of `width` elements, flattened."""
    return rows if columns is None else rows.view(-1, width)[:, slice(*columns)].reshape(-1)


class RandomWeights:
    """Values that are a function of (seed, name) alone: equal on every rank, under every engine.

    Norm weights are one (zero in Gemma, which adds one), biases zero, matrices normal with variance 1 ÷ columns (LeCun et
    al., Efficient BackProp, §4.6): the usual 0.02 is that for some 2,500 columns, and too small for a small model to learn.
    """

    def __init__(self, table: Sequence[Parameter], seed: int, model_type: str) -> None:
        self._shapes = {base_name(p.name): p.shape for p in table}
        self._seed, self._norm = seed, 0.0 if model_type == "gemma" else 1.0
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, start: int, stop: int, columns: Columns = None) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._whole(name))
        return _cut(self._last[1][start:stop], self._shapes[name][-1], columns)

    def _whole(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else self._norm)
        return torch.empty(math.prod(shape)).normal_(0.0, shape[-1] ** -0.5, generator=_generator(self._seed, name))


class AdapterWeights:
    """LoRA's initial values (arXiv:2106.09685, §4.1; peft/tuners/lora/layer.py reset_lora_parameters): A uniform as
    `nn.Linear`'s default, B zero; a function of (seed, name) alone."""

    def __init__(self, table: Sequence[Parameter], seed: int) -> None:
        self._shapes = {p.name: p.shape for p in table if p.adapter and not is_magnitude(p.name)}
        self._seed = seed

    def read(self, name: str, start: int, stop: int, columns: Columns = None) -> torch.Tensor:
        rows, width = self._shapes[name]
        if ".lora_B." in name:
            return _cut(torch.zeros(stop - start), width, columns)
        bound = 1.0 / math.sqrt(width)
        whole = torch.empty(rows * width).uniform_(-bound, bound, generator=_generator(self._seed, name))
        return _cut(whole[start:stop], width, columns)


class SafetensorsWeights:
    """The tensors of a Hugging Face folder, memory-mapped; only the rows that are asked for are read."""

    def __init__(self, folder: Path, table: Sequence[Parameter]) -> None:
        self._folder = folder
        self._files = _index(folder)
        self._open: dict[str, Any] = {}
        self._names = self._match([p for p in table if not p.adapter])

    def _match(self, table: Sequence[Parameter]) -> dict[str, str]:
        """Parameter name to tensor name in the files. A checkpoint of the headless model lacks the "model." prefix.

        Raises:
            ModelError: tensors are missing or have other shapes; the first few are named.
        """
        names: dict[str, str] = {}
        faults: list[str] = []
        for parameter in table:
            name = base_name(parameter.name)
            stored = next((c for c in (name, name.removeprefix("model.")) if c in self._files), None)
            if stored is None:
                faults.append(f"{name} is missing")
                continue
            shape = tuple(self._slice(stored).get_shape())
            if shape != parameter.shape:
                faults.append(f"{name} has shape {list(shape)}, the config says {list(parameter.shape)}")
            names[name] = stored
        if faults:
            more = f" … and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ModelError(
                Fault("model.path", f"{self._folder}: {'; '.join(faults[:3])}{more}",
                      "the weights must belong to the config.json beside them: save both with save_pretrained")
            )  # fmt: skip
        return names

    def _slice(self, stored: str) -> Any:
        file = self._files[stored]
        if file not in self._open:
            self._open[file] = _open(self._folder / file)
        return self._open[file].get_slice(stored)

    def read(self, name: str, start: int, stop: int, columns: Columns = None) -> torch.Tensor:
        piece = self._slice(self._names[name])
        width = math.prod(piece.get_shape()[1:])
        first, last = start // width, -(-stop // width)
        if columns is not None:
            part: torch.Tensor = piece[first:last, slice(*columns)]
            return part.reshape(-1)
        rows: torch.Tensor = piece[first:last]
        return rows.reshape(-1)[start - first * width : stop - first * width]


def _open(file: Path) -> Any:
    """The file, memory-mapped.

    Raises:
        ModelError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelError(Fault("model.path", f"{file}: damaged weights ({error})", "download the folder again")) from error


def _index(folder: Path) -> dict[str, str]:
    """Tensor name to file name.

    Raises:
        ModelError: no safetensors in the folder, or a file of its index is missing, or the index cannot be read.
    """
    listing = folder / "model.safetensors.index.json"
    if not listing.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise ModelError(
                Fault("model.path", f"{folder} holds no *.safetensors",
                      "load it once with transformers and call save_pretrained: pickled weights (*.bin) are never opened")
            )  # fmt: skip
        return {name: file.name for file in found for name in list(_open(file).keys())}
    try:
        files: dict[str, str] = dict(json.loads(listing.read_text())["weight_map"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(Fault("model.path", f"{listing}: not an index ({error!r})", "download the folder again")) from error
    odd = sorted({str(file) for file in files.values() if Path(str(file)).name != file or not file.endswith(".safetensors")})
    if odd:
        problem = f"{listing} names {odd[0]!r}, which is no *.safetensors of this folder"
        raise ModelError(Fault("model.path", problem, "load it with transformers and call save_pretrained anew"))
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        problem = f"{folder}: {len(missing)} files of the index are missing, first {missing[0]}"
        raise ModelError(Fault("model.path", problem, "download the folder again"))
    return files


HEAD_WEIGHT, EMBEDDED = f"{HEAD}.weight", f"model.{EMBEDDING}.weight"


class InitialWeights:
    """What a run starts from: adapters from the seed, DoRA's lengths from the rows that they are of, everything else from the
    model's files or from the seed. An `untied` head starts as the embedding that it was."""

    def __init__(
        self, base: _Source, adapters: AdapterWeights, widths: Mapping[str, int], compute: str, *, untied: bool = False
    ) -> None:
        self._base, self._adapters, self._widths, self._untied = base, adapters, widths, untied
        self._dtype: torch.dtype = getattr(torch, TORCH_NAMES[compute])

    def read(self, name: str, start: int, stop: int, columns: Columns = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter, in the source's dtype; with `columns` only those of its rows."""
        if ".lora_A." in name or ".lora_B." in name:
            return self._adapters.read(name, start, stop, columns)
        if is_magnitude(name):
            weight = rows_of(name)
            return lengths(partial(self.read, weight), self._widths[weight], start, stop, self._dtype)
        stored = base_name(name)
        return self._base.read(EMBEDDED if self._untied and stored == HEAD_WEIGHT else stored, start, stop, columns)


def open_weights(spec: RunSpec, table: Sequence[Parameter]) -> InitialWeights:
    """The initial values of the parameters in `table` (from `table_of`).

    Raises:
        ModelError: the files do not hold what the table needs.
    """
    base: _Source
    if spec.model.path is None:
        assert spec.model.shape is not None, "a model without a path has a shape (checked in compose)"
        base = RandomWeights(table, spec.seed, spec.model.shape.model_type)
    else:
        own = [p for p in table if not (spec.tuning.untie and base_name(p.name) == HEAD_WEIGHT)]
        base = SafetensorsWeights(resolve(spec.model), own)
    widths = {p.name: p.shape[-1] for p in table}
    return InitialWeights(base, AdapterWeights(table, spec.seed), widths, spec.precision.compute, untied=spec.tuning.untie)
