"""The built-in sample: what is shipped, and that every label of it is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data import IGNORED, Prepared
from orchestrator.data.sample.make_tokenizer import train_tokenizer
from orchestrator.data.tokenizer import SAMPLE

ROWS = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_tokenizer_has_2048_entries_and_distinct_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 2048
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_any_text_round_trips(tokenizer: Any) -> None:
    texts = [row["instruction"] + "\n" + row["output"] for row in ROWS] + ["日本語 🎈 \t\r\n  naïve", "\x00\x7f"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "orchestrator.data.sample.make_tokenizer", str(tmp_path)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes()
    assert train_tokenizer().get_vocab_size() == 2048


def test_the_sample_is_varied_and_short(sample: Prepared) -> None:
    assert len(ROWS) == len(sample) == 255
    assert len({(row["instruction"], row["input"]) for row in ROWS}) == 255
    assert sum(bool(row["input"]) for row in ROWS) >= 30
    assert sample.lengths.max() < 64
    assert sample.labelled.max() <= 40


def test_exactly_the_answer_and_its_end_are_learned_in_every_row(sample: Prepared, tokenizer: Any) -> None:
    for row, (ids, labels) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        source = ROWS[row]
        question = "\n".join(filter(None, (source["instruction"], source["input"])))
        prompt = f"<|bos|><|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        answer = source["output"] + "<|im_end|>"
        assert tokenizer.decode(ids) == prompt + answer + "\n"
        first = len(tokenizer(prompt)["input_ids"])
        learned = tokenizer(answer)["input_ids"]
        assert labels.tolist() == [IGNORED] * first + learned + [IGNORED]
        assert learned[-1] == tokenizer.eos_token_id
        assert sample.labelled[row] == len(learned)
        assert sample.lengths[row] == len(ids)


def test_columns_are_views_of_the_file(sample: Prepared) -> None:
    ids = sample.input_ids[200]
    assert ids.dtype == np.int32
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_importing_the_room_loads_no_library() -> None:
    code = "import sys, orchestrator.data; sys.exit(bool({'transformers', 'pyarrow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
