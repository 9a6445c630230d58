"""Opening an export with the libraries that people will open it with: to check it, and to ask it something."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from orchestrator.data.encode import beginning
from orchestrator.errors import CheckpointError, Fault
from orchestrator.model.build import in_block
from orchestrator.model.quantised import quantise_loaded
from orchestrator.spec import INT8, NF4, NF4_DOUBLE
from orchestrator.train.export import CHECKSUMS, QUANTISATION, adapter_name, compare, end_tokens


def quiet() -> None:
    """Keep transformers' progress bars and advice off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """The base model of the adapter in `folder`: the copy beside it where there is one, else what its config names."""
    if (folder / "base" / "config.json").is_file():
        return str(folder / "base")
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def quantisation_of(folder: Path) -> dict[str, Any]:
    """How the base of the adapter in `folder` was quantised in training, as transformers' BitsAndBytesConfig names it; empty
    where it was not."""
    file = folder / QUANTISATION
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def form_of(stated: dict[str, Any]) -> str:
    """The format of `spec.quant` that the arguments of `quantisation_of` mean."""
    if stated.get("load_in_8bit"):
        return INT8
    return NF4_DOUBLE if stated["bnb_4bit_use_double_quant"] else NF4


def check(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Load every model and adapter under `folder` and compare each tensor with the checksums written beside it.

    An adapter is loaded onto a base without storage, so that checking it costs the adapter's memory alone.

    Raises:
        CheckpointError: a tensor differs or is missing.
    """
    quiet()
    for part in (folder, folder / "base", folder / "merged"):
        if (part / CHECKSUMS).is_file():
            sums = json.loads((part / CHECKSUMS).read_text(encoding="utf-8"))
            opened = _adapter_tensors(part, trust_remote_code) if is_adapter(part) else _model_tensors(part, trust_remote_code)
            compare(sums, opened, part)


def _model_tensors(folder: Path, trust_remote_code: bool) -> Iterable[tuple[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return model.state_dict().items()


def _adapter_tensors(folder: Path, trust_remote_code: bool) -> Iterable[tuple[str, torch.Tensor]]:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_of(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    _hollow(base)
    model = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    return (
        (adapter_name(name.replace(".modules_to_save.default.", ".")), tensor)
        for name, tensor in model.state_dict().items()
        if "lora_" in name or ".modules_to_save." in name
    )


def _hollow(model: nn.Module) -> None:
    """Give every parameter one element on the CPU, seen as its whole shape. PEFT moves adapters to where their base is, and
    would move them to the meta device otherwise."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                element = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(element, requires_grad=False)


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor, trust_remote_code: bool) -> torch.Tensor:
    """The logits in fp32 that the model in `folder` gives for `ids`, on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return logits


def open_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of the export in `folder`, adapters on their base.

    Raises:
        CheckpointError: `folder` is not an export.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        problem = f"{folder} holds neither a model nor an adapter"
        raise CheckpointError(Fault("run", problem, "name a run folder whose run has finished with export.format=hf"))
    source = base_of(folder) if is_adapter(folder) else str(folder)
    base = quantisation_of(folder)
    dtype = base["bnb_4bit_compute_dtype"] if base else "auto"
    _refuse_pickles(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"{source} cannot be opened: {str(error).splitlines()[0][:200]}"
        raise CheckpointError(Fault("run", problem, "name a run folder whose export is whole")) from None
    if base:
        # Not bitsandbytes' own layers: NF4's kernel for the CPU is wrong where a row is no multiple of the block, and the one
        # of int8 rounds its inputs.
        quantise_loaded(model, in_block, form_of(base))
    if is_adapter(folder):
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by old names: nothing a reader can mend
            model = PeftModel.from_pretrained(model, str(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _refuse_pickles(folder: Path) -> None:
    """Pass unless an adapter in `folder` would be read from a pickle.

    Raises:
        CheckpointError: it holds no adapter_model.safetensors.
    """
    if is_adapter(folder) and not (folder / "adapter_model.safetensors").is_file():
        problem = f"{folder} holds no adapter_model.safetensors; pickled adapters (*.bin) are never opened"
        raise CheckpointError(Fault("run", problem, "load it once with PEFT and call save_pretrained, or train it anew"))


def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy answer of `model` to one user turn, prompted through the tokenizer's chat template; without a template (a
    model of raw text) how `prompt` goes on."""
    if tokenizer.chat_template is None:
        text = "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer))) + prompt
    else:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    inputs.pop("token_type_ids", None)
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends)
    reply: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return reply.strip()
