"""Sources: files, folders, patterns, hub ids and weights; raw text and completions; and what is said of unusable ones."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import IGNORED, Prepared, load_tokenizer, prepare, steps, steps_per_epoch
from orchestrator.data.crew import encode_all
from orchestrator.data.encode import Chunk, Encoder, Shard
from orchestrator.data.order import drawn, epoch_size
from orchestrator.data.records import Record
from orchestrator.data.rows import rows_of
from orchestrator.errors import DataError
from orchestrator.spec import Batch, Data, Source

Prepare = Callable[..., Prepared]

ALPACA = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(6)]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"hi {i}"}]} for i in range(4)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a list, lines, a table and a text, in three formats."""
    place = tmp_path / "data"
    (place / "more").mkdir(parents=True)
    (place / "a.json").write_text(json.dumps(ALPACA[:3]))
    (place / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    pq.write_table(pa.Table.from_pylist(ALPACA[3:]), place / "more" / "c.parquet")
    (place / "more" / "d.txt").write_text("One line is one document.\n\nSo is this.\n")
    (place / "README.md").write_text("not data")
    return place


def texts(prepared: Prepared, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in prepared.input_ids]


def test_a_folder_gives_the_rows_of_all_its_files_each_in_its_own_format(
    prepared_file: Prepare, folder: Path, tokenizer: Any
) -> None:
    prepared = prepared_file(folder)
    assert prepared.report.format == "alpaca, messages, text"
    assert (prepared.report.rows, len(prepared)) == (12, 12)
    found = texts(prepared, tokenizer)
    assert ["answer 0" in found[0], "hi 0" in found[3], "answer 3" in found[7]] == [True] * 3
    assert found[10:] == ["One line is one document.<|im_end|>", "So is this.<|im_end|>"]


def test_a_pattern_gives_the_files_that_match(prepared_file: Prepare, folder: Path) -> None:
    assert len(prepared_file(f"{folder}/*.json*")) == 7
    assert len(prepared_file(f"{folder}/**/*.parquet")) == 3


def test_weights_say_how_often_an_epoch_shows_a_row(prepared_file: Prepare, folder: Path) -> None:
    sources = (Source(str(folder / "a.json"), 2.0), Source(str(folder / "b.jsonl"), 0.5), Source(str(folder / "more"), 1.0))
    prepared = prepared_file(None, sources=sources)
    rows = rows_of(prepared)
    assert epoch_size(rows) == 2 * 3 + 4 // 2 + 5
    shown: Counter[int] = Counter()
    for epoch in range(4):
        order = drawn(rows, 3, epoch)
        assert len(order) == 13
        assert order.tolist() == drawn(rows, 3, epoch).tolist()
        shown.update(int(rows.documents(int(row))[0]) for row in order)
    assert [shown[document] for document in range(12)] == [8] * 3 + [2] * 4 + [4] * 5
    assert drawn(rows, 3, 0).tolist() != drawn(rows, 3, 1).tolist()


def test_rows_of_one_weight_are_packed_together_and_of_two_apart(prepared_file: Prepare, folder: Path) -> None:
    files = [str(folder / name) for name in ("a.json", "b.jsonl")]
    together = rows_of(prepared_file(None, sources=tuple(Source(file) for file in files), packing="best_fit", seq_len=256))
    apart = rows_of(
        prepared_file(None, sources=(Source(files[0], 1.0), Source(files[1], 3.0)), packing="best_fit", seq_len=256)
    )
    assert (len(together), len(apart)) == (1, 2)
    assert [weight for *_, weight in apart.shares] == [1.0, 3.0]


def test_a_weighted_run_is_the_same_on_any_ranks_and_when_resumed(prepared_file: Prepare, folder: Path) -> None:
    sources = (Source(str(folder / "a.json"), 1.5), Source(str(folder / "b.jsonl"), 0.25))
    prepared = prepared_file(None, sources=sources)

    def labels(ranks: int, start: int) -> list[Counter[Any]]:
        batch = Batch(4, 1, 4 // ranks)
        total = 3 * steps_per_epoch(prepared, batch)
        made = [
            list(steps(prepared, batch, seed=2, rank=rank, ranks=ranks, pad_id=0, start_step=start, total_steps=total))
            for rank in range(ranks)
        ]
        return [
            Counter(tuple(ids.tolist()) for step in of_ranks for micro in step.micro_batches for ids in micro.input_ids)
            for of_ranks in zip(*made, strict=True)
        ]

    whole = labels(1, 0)
    assert labels(2, 0) == labels(4, 0) == whole
    assert labels(2, 1) == whole[1:]


@pytest.mark.parametrize("begins", [False, True])
def test_raw_text_is_learned_whole_and_ends_once(
    write_rows: Callable[..., Path], tokenizer: Any, tmp_path: Path, begins: bool
) -> None:
    """A tokenizer that puts its beginning and end tokens around a text is given neither twice."""
    from tokenizers import processors

    own = copy.deepcopy(tokenizer)
    if begins:
        around = [("<|bos|>", own.bos_token_id), ("<|im_end|>", own.eos_token_id)]
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A <|im_end|>", special_tokens=around
        )
    path = write_rows([{"text": "All of this is learned."}])
    prepared = prepare(Data(str(path), 64), own, 0, tmp_path / "cache")
    assert prepared.report.format == "text"
    expected = "<|bos|>" * begins + "All of this is learned.<|im_end|>"
    assert tokenizer.decode(prepared.input_ids[0]) == expected
    assert prepared.labels[0][1:].tolist() == prepared.input_ids[0][1:].tolist()


def test_long_text_is_split_so_that_no_token_is_lost(prepared_file: Prepare, write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"text": "word and " * 100}, {"text": "short"}, {"text": "other and " * 40}])
    whole, split = prepared_file(path, seq_len=1000), prepared_file(path, seq_len=16)
    assert (split.report.rows, split.report.kept, split.report.split, split.report.truncated) == (3, 3, 2, 0)
    assert f"2 split into pieces ({len(split)} samples in all)" in split.report.sentence()
    assert split.labelled.sum() == whole.labelled.sum() == whole.report.labelled
    assert split.lengths.max() == 16
    pieces, texts_whole = ([token for ids in each.input_ids for token in ids[1:]] for each in (split, whole))
    assert pieces == texts_whole


def test_the_pieces_of_a_row_are_held_out_together(prepared_file: Prepare, write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"text": f"{number} and " * 60} for number in range(10)])
    prepared = prepared_file(path, seq_len=16, eval_fraction=0.3)
    end = prepared.input_ids[len(prepared) - 1][-1]
    row = np.cumsum([0, *(ids[-1] == end for ids in prepared.input_ids)])[:-1]
    assert len(set(row[prepared.eval])) == 3
    assert not set(row[prepared.eval]) & set(row[prepared.train])


def test_long_conversations_are_split_on_request(prepared_file: Prepare, write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"instruction": "word " * 50, "output": "answer " * 50}])
    whole, split = prepared_file(path, seq_len=1000), prepared_file(path, seq_len=32, on_long="split")
    assert split.labelled.sum() == whole.labelled.sum()
    assert (split.labelled > 0).all()
    assert len(split) < -(-int(whole.lengths[0]) // 31)  # the first pieces hold the question alone


def test_a_completion_is_learned_and_its_prompt_is_not(
    prepared_file: Prepare, write_rows: Callable[..., Path], tokenizer: Any
) -> None:
    turns = {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}
    prepared = prepared_file(write_rows([{"prompt": "Two and two is", "completion": " four."}, turns]))
    assert prepared.report.format == "completion"
    learned = [
        tokenizer.decode(ids[labels != IGNORED]) for ids, labels in zip(prepared.input_ids, prepared.labels, strict=True)
    ]
    assert tokenizer.decode(prepared.input_ids[0]) == "Two and two is four.<|im_end|>"
    assert learned == [" four.<|im_end|>", "y<|im_end|>"]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"text": " "}], {}, 'rows.jsonl: 1 of 1 rows (line 1): field "text" is empty'),
        ([{"text": "a"}, {"text": 3}], {}, '1 of 2 rows (line 2): field "text" is a JSON number, not text'),
        ([{"prompt": "a", "completion": ""}], {}, 'field "completion" is empty: there is nothing to learn'),
        ([{"prompt": "a"}], {"format": "completion"}, 'field "completion" missing; columns found: prompt'),
        (
            [ALPACA[0], {"text": "a"}],
            {},
            '1 of 2 rows (line 2): fields "instruction" and "output" missing; columns found: text',
        ),
        (
            [ALPACA[0]],
            {"format": "messages"},
            'field "messages" (or "conversations") missing; columns found: instruction, output',
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    prepared_file: Prepare, write_rows: Callable[..., Path], rows: list[Any], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        prepared_file(write_rows(rows), **options)
    assert expected in str(caught.value)


def test_the_faults_of_all_sources_are_told_together(prepared_file: Prepare, folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"question": "a", "reply": "b"}]), tmp_path / "odd.parquet")
    (tmp_path / "broken.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": ')
    names = ["odd.parquet", "broken.json", "nowhere.json"]
    with pytest.raises(DataError) as missing:
        prepared_file(None, sources=tuple(Source(str(tmp_path / name)) for name in names))
    assert "nowhere.json does not exist" in str(missing.value)
    with pytest.raises(DataError) as caught:
        prepared_file(None, sources=(Source(str(folder)), *(Source(str(tmp_path / name)) for name in names[:2])))
    text = str(caught.value)
    assert "(2 faults)" in text
    assert "odd.parquet: the columns are of no known format; found: question, reply" in text
    assert "broken.json is not valid JSON: the file ends" in text


def test_a_file_that_breaks_off_in_the_middle_is_told_with_its_line(prepared_file: Prepare, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in ALPACA * 20]
    (tmp_path / "rows.json").write_text("[" + ",\n".join(rows[:100]) + ',\n{"instruction": oops}\n]')
    with pytest.raises(DataError, match=r"rows\.json is not valid JSON: line 101: expecting value"):
        prepared_file(tmp_path / "rows.json")
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:100], "{oops", *rows[100:]]))
    with pytest.raises(DataError, match=r"1 of 121 rows \(line 101\): not one whole JSON object on the line") as caught:
        prepared_file(tmp_path / "rows.jsonl")
    assert "or set data.on_malformed=skip to leave them out" in str(caught.value)
    assert prepared_file(tmp_path / "rows.jsonl", on_malformed="skip").report.malformed == 1


def test_only_so_many_rows_are_read(prepared_file: Prepare, folder: Path) -> None:
    assert len(prepared_file(folder, max_rows=5)) == 5


def test_a_hub_id_without_a_network_says_how_to_go_on(prepared_file: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        prepared_file("nobody/no-such-set")
    text = str(caught.value)
    assert "nobody/no-such-set (subset default, split train) cannot be read from the hub" in text
    assert "hf download --repo-type dataset nobody/no-such-set --local-dir FOLDER" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_datasets_library_are_those_of_the_file(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.data.hub import open_hub

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = open_hub(str(tmp_path / "set"), None, "train", streaming=streaming)
    assert [record.value for record in rows.rows()] == ALPACA
    with pytest.raises(DataError, match="split nowhere"):
        open_hub(str(tmp_path / "set"), None, "nowhere", streaming=streaming)


def test_two_processes_give_what_one_gives(write_rows: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows([ALPACA[i % 6] | {"instruction": f"{i}"} for i in range(1500)])
    alone, crew = (prepare(Data(str(path), 64, workers=workers), tokenizer, 0, tmp_path / str(workers)) for workers in (0, 2))
    assert alone.digest == crew.digest
    assert alone.report == crew.report
    assert (tmp_path / "0" / alone.digest / "rows.arrow").read_bytes() == (
        tmp_path / "2" / alone.digest / "rows.arrow"
    ).read_bytes()


def test_progress_is_told_to_the_end(write_rows: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    told: list[float] = []
    path = write_rows([ALPACA[0]] * 1000)
    prepare(Data(str(path), 64), tokenizer, 0, tmp_path / "cache", lambda progress: told.append(progress.share))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) == 4


def test_the_real_text_files_are_full_when_packed(shared_data: Path, shared_tokenizer_path: Path, tmp_path: Path) -> None:
    names = ("alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "c4_demo.jsonl", "wiki_demo.txt")
    sources = tuple(Source(str(shared_data / name)) for name in names)
    data = Data(None, 2048, tokenizer=str(shared_tokenizer_path), sources=sources, packing="best_fit")
    prepared = prepare(data, load_tokenizer(data, None), 0, tmp_path)
    assert [part.format for part in prepared.parts] == ["alpaca", "messages", "text", "text"]
    assert rows_of(prepared).fill(2048) >= 0.995


class Doomed(Encoder):
    """An encoder whose process is killed, as by a machine that has run out of memory."""

    def encode(self, chunk: Chunk) -> Shard:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(chunk)


class SlowEncoder(Encoder):
    """An encoder that says which process works and takes its time, so that signals come meanwhile."""

    def encode(self, chunk: Chunk) -> Shard:
        time.sleep(0.5)
        return Shard(file=os.getpid(), share=chunk.share)


def test_the_signals_of_a_batch_system_do_not_reach_the_processes_that_tokenise(tokenizer: Any) -> None:
    children = psutil.Process().children
    before = {child.pid for child in children()}
    shards = encode_all(SlowEncoder(tokenizer, None, 64, "drop"), [Chunk(0, "text", [], each) for each in range(12)], 2)
    first = next(shards)
    crew = [child for child in children() if child.pid not in before]
    assert len(crew) >= 2
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        for process in crew:
            # From a stranger, as from a batch system: the crew heeds its parent's SIGTERM alone.
            subprocess.run(["kill", f"-{number.value}", str(process.pid)], check=True)
    done = [first, *shards]
    assert [shard.share for shard in done] == list(range(12)) and {shard.file for shard in done} <= {each.pid for each in crew}


def test_a_tokenising_process_that_is_killed_ends_the_run_with_a_word(tokenizer: Any) -> None:
    chunks = [Chunk(0, "text", [Record(1, {"text": "a"})], 1.0)]
    with pytest.raises(DataError, match=r"one of the 1 processes that tokenise was ended from outside") as caught:
        list(encode_all(Doomed(tokenizer, None, 16, "auto"), chunks, 1))
    assert "set data.workers=0" in str(caught.value)
