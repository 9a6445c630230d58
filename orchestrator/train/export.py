"""Export: what was trained, as a folder that transformers or PEFT opens, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from orchestrator.errors import CheckpointError, Fault
from orchestrator.spec import INT8, MAGNITUDE, NF4_DOUBLE
from orchestrator.train.storage import remedy_for
from orchestrator.units import format_bytes

SHARD_BYTES = 2 * 10**9
CHECKSUMS = "checksums.json"
"""Beside every model and adapter of an export: what its tensors were when they were gathered."""

QUANTISATION = "quantization.json"
"""Beside the adapter of a quantised base: how to quantise it, as the arguments of transformers' BitsAndBytesConfig."""

WRAPPER = "base_model.model."
_ADAPTER = ".default.weight"

Checksums = dict[str, str]
"""Tensor name to the checksum of its bytes."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an export needs of the module besides tensors, taken before an engine wraps it.

    `config` and `generation` are transformers' objects, `architecture` the class name, `adapter` PEFT's config or None.
    """

    config: Any
    generation: Any
    architecture: str
    adapter: Any

    @classmethod
    def of(cls, module: Any) -> Source:
        """The source of `module`, a transformers model or a PEFT model around one."""
        adapters = getattr(module, "peft_config", None)
        inner = module.get_base_model() if adapters else module
        generation = getattr(inner, "generation_config", None)
        return cls(inner.config, generation, type(inner).__name__, adapters["default"] if adapters else None)


def checksum(tensor: torch.Tensor) -> str:
    """BLAKE2b of the dtype, shape and bytes of `tensor`."""
    data = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=20)
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_name(name: str) -> str:
    """The name under which PEFT saves the adapter tensor that the wrapped module calls `name`."""
    stem = name.removesuffix(_ADAPTER)
    if stem == name or stem.endswith(MAGNITUDE):
        return stem
    return f"{stem}.weight"


def base_name(name: str) -> str:
    """The name in the unwrapped model of the base tensor that the wrapped module calls `name`."""
    return name.removeprefix(WRAPPER).replace(".base_layer.", ".")


def write_model(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Checksums:
    """The checksums of what was written: safetensors files of at most SHARD_BYTES in `folder`, with transformers' index.

    One file's worth of tensors is in memory at a time. One file is named `model.safetensors`, more get an index.
    """
    sums: Checksums = {}
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, folder / f"part-{len(files):05d}", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.detach().contiguous()
        sums[name] = checksum(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "part-00000").replace(folder / "model.safetensors")
        return sums
    where: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number:05d}").replace(folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


def end_tokens(tokenizer: Any, stated: int | list[int] | None) -> list[int]:
    """The ids that end an answer: `stated` by the model, the tokenizer's end, and what its template puts after a turn."""
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    if tokenizer.chat_template is None:  # trained on raw text
        return sorted(end for end in ends if end is not None)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
    after = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if after and after[0] in tokenizer.all_special_ids:
        ends.add(after[0])
    return sorted(end for end in ends if end is not None)


def state_special_tokens(source: Source, tokenizer: Any, *, native: bool) -> None:
    """Put the special ids of `tokenizer` into both configurations, so that `generate()` stops where answers ended in training.

    What the model states itself stays, and gains the ends it lacks, if the tokenizer is its own (`native`); ids of another
    vocabulary would mean other words.
    """
    ends = end_tokens(tokenizer, getattr(source.generation, "eos_token_id", None) if native else None)
    for settings in (source.config, source.generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if settings is not None and (not native or getattr(settings, name, None) is None):
                setattr(settings, name, getattr(tokenizer, name))
    if source.generation is not None and ends:
        source.generation.eos_token_id = ends if len(ends) > 1 else ends[0]


def write_config(folder: Path, source: Source, dtype: torch.dtype) -> None:
    """The configuration of the model, stating `dtype` and its class, and its generation settings.

    The key-value cache, which training switches off, is on again in the copy: generation without it is many times slower.
    """
    source.config.use_cache = True
    source.config.dtype = dtype
    source.config.architectures = [source.architecture]
    source.config.save_pretrained(folder)
    if source.generation is not None:
        source.generation.save_pretrained(folder)


def write_adapter(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], config: Any, base: str) -> Checksums:
    """The checksums of what was written: a PEFT adapter in `folder` with PEFT's `config`, which names `base` as its model, and
    as modules to save those that were trained whole."""
    adapters = {adapter_name(name): tensor.detach().contiguous() for name, tensor in tensors}
    whole = {name.removeprefix(WRAPPER).rpartition(".")[0] for name in adapters if ".lora_" not in name}
    config.modules_to_save = sorted(whole) or None
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    return {name: checksum(tensor) for name, tensor in adapters.items()}


def write_quantisation(folder: Path, form: str, compute: torch.dtype) -> None:
    """State in `folder` that the adapter was trained on a base in `form`. bitsandbytes' own int8 layer rounds its inputs too,
    which training here did not."""
    arguments: dict[str, Any] = {"load_in_8bit": True}
    if form != INT8:
        arguments = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": form == NF4_DOUBLE,
        }
    arguments["bnb_4bit_compute_dtype"] = str(compute).removeprefix("torch.")
    (folder / QUANTISATION).write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


def replaced(base: Iterable[tuple[str, torch.Tensor]], trained: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Base tensors with those of the same name in `trained` in their place."""
    return ((name, trained.get(name, tensor)) for name, tensor in base)


def merged(
    base: Iterable[tuple[str, torch.Tensor]], adapters: dict[str, torch.Tensor], scaling: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base tensors under their own names with `scaling` × B·A added where `adapters` (by PEFT's saved name) has a pair, and
    replaced where it has the whole tensor.

    With DoRA the rows of the sum are brought to their trained lengths. All is made in fp32 and rounded once to the
    base's dtype.
    """
    for name, tensor in base:
        stem = f"{WRAPPER}{name.removesuffix('.weight')}"
        down, up = adapters.get(f"{stem}.lora_A.weight"), adapters.get(f"{stem}.lora_B.weight")
        whole = adapters.get(f"{WRAPPER}{name}")
        if whole is not None:
            tensor = whole
        elif name.endswith(".weight") and down is not None and up is not None:
            whole = tensor.float() + scaling * (up.float() @ down.float())
            length = adapters.get(f"{stem}.{MAGNITUDE}")
            if length is not None:
                whole *= (length.float() / torch.linalg.vector_norm(whole, dim=1)).unsqueeze(1)
            tensor = whole.to(tensor.dtype)
        yield name, tensor


def write_checksums(folder: Path, sums: Checksums) -> None:
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def compare(written: Checksums, found: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Hold the tensors `found` in the reopened export to those that were written, bit by bit.

    Raises:
        CheckpointError: some differ or are missing.
    """
    missing = dict(written)
    wrong = [name for name, tensor in found if name in missing and missing.pop(name) != checksum(tensor)]
    if wrong or missing:
        problem = f"{folder} was reopened: of {len(written)} tensors {len(wrong)} differ and {len(missing)} are missing"
        names = ", ".join([*wrong, *missing][:5])
        raise CheckpointError(
            Fault("export", f"{problem} ({names})", "the checkpoint is whole: export again from it, on another disk")
        )


def failed(folder: Path, error: OSError | SafetensorError) -> CheckpointError:
    """The error for an export that could not be written; what there is of it is removed."""
    free = shutil.disk_usage(folder.parent).free
    shutil.rmtree(folder, ignore_errors=True)
    problem = f"{folder} could not be written: {str(error).splitlines()[0]}; {format_bytes(free)} are free"
    remedy = remedy_for(str(error)) or "free space there"
    return CheckpointError(Fault("export", problem, f"{remedy}; the checkpoint is whole: resume=auto exports it"))
