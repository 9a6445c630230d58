"""The tokenizer of a run: named by the data, found with the model, or built in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.chat import resolve_template
from orchestrator.errors import DataError, Fault
from orchestrator.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = Path(__file__).parent / "sample"
"""The folder of the built-in data and tokenizer."""

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")
"""Names of the files that tokenizers of any kind are kept in."""


def load_tokenizer(data: Data, model_path: str | None, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer`, else of the model (folder or hub id), else the built-in one of 2048 tokens.

    Its `chat_template` is set to what `data.chat_template` asks for, so that a saved copy prompts as it was trained. It may
    have none: raw text needs none.

    Raises:
        DataError: the tokenizer, or the template that is asked for, cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = data.tokenizer or model_path or str(SAMPLE)
    field = "data.tokenizer" if data.tokenizer else "model.path"
    remedy = "set data.tokenizer to a folder with tokenizer.json and tokenizer_config.json, or to a hub id"
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise DataError(Fault(field, f"the folder {source} does not exist, so no tokenizer can be loaded", remedy))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(source).expanduser()), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = _absence(Path(source).expanduser()) or str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(Fault(field, f"no tokenizer can be loaded from {source}: {reason[:200]}", remedy)) from error
    if data.chat_template or tokenizer.chat_template:
        tokenizer.chat_template = resolve_template(data.chat_template, tokenizer)
    return tokenizer


def _absence(folder: Path) -> str:
    """What to say of a folder without any tokenizer file; "" where there is one, or no folder."""
    if not folder.is_dir() or any(match for pattern in TOKENIZER_FILES for match in folder.glob(pattern)):
        return ""
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
    return f"it has no tokenizer.json (it holds {held})"


def choose_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short rows: the pad token, else the end token, else 0. The vocabulary never changes.

    Which one it is does not matter to learning: labels are made from the spans of answers, never from ids, and
    the filling stands on the right, where no real token sees it.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything of the tokenizer that decides ids: its class, model, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, model, json.dumps(special, sort_keys=True), str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
