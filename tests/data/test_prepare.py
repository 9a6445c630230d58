"""Preparing: the cache, the limits, the split, and every refusal of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.data import Prepared, check_vocabulary, prepare
from orchestrator.errors import DataError
from orchestrator.spec import Data

Prepare = Callable[..., Prepared]
Write = Callable[..., Path]


def row(question: str = "Why?", answer: str = "Because.") -> dict[str, str]:
    return {"instruction": question, "output": answer}


def refused(prepare_file: Prepare, path: Path | None, **options: Any) -> str:
    """The message of the refusal, which fits on one screen and leaves nothing behind but the fingerprint."""
    with pytest.raises(DataError) as caught:
        prepare_file(path, **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= 24
    return text


def test_a_second_call_reads_the_cache(prepared_file: Prepare, write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([row() for _ in range(5)])
    first = prepared_file(path)
    folder = tmp_path / "cache" / first.digest
    stamp = (folder / "rows.arrow").stat().st_mtime_ns
    second = prepared_file(path)
    assert (second.digest, second.report) == (first.digest, first.report)
    assert (folder / "rows.arrow").stat().st_mtime_ns == stamp
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == sorted([first.digest, "fingerprints"])


def test_the_digest_follows_contents_and_settings_but_not_name_time_or_seed(prepared_file: Prepare, write_rows: Write) -> None:
    path = write_rows([row("a"), row("b")])
    digest = prepared_file(path).digest
    os.utime(path, (1, 1))
    assert prepared_file(path, seed=9, eval_fraction=0.5).digest == digest
    assert prepared_file(path.rename(path.with_name("other.jsonl"))).digest == digest
    other = path.with_name("other.jsonl")
    variants = (
        {"seq_len": 64},
        {"on_long": "drop"},
        {"on_malformed": "skip"},
        {"chat_template": "alpaca"},
        {"format": "alpaca"},
    )
    assert len({digest} | {prepared_file(other, **options).digest for options in variants}) == 1 + len(variants)
    assert prepared_file(write_rows([row("a"), row("c")])).digest != digest


def test_the_tokenizer_is_part_of_the_digest(write_rows: Write, tokenizer: Any, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["Because"])
    data = Data(str(write_rows([row()])), 128)
    one, two = (prepare(data, each, 0, tmp_path / "cache") for each in (tokenizer, other))
    assert one.digest != two.digest
    assert len(one.input_ids[0]) > len(two.input_ids[0])


def test_processes_that_prepare_at_once_share_one_result(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([row(f"q{i}", f"a{i}") for i in range(300)])
    code = (
        "import sys; from pathlib import Path; from orchestrator.data import load_tokenizer, prepare\n"
        "from orchestrator.spec import Data; data = Data(sys.argv[1], 128)\n"
        "print(prepare(data, load_tokenizer(data, None), 0, Path(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {process.communicate(timeout=300)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(digests) == 1
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == sorted([*digests, "fingerprints"])


def test_more_rows_than_a_record_batch(prepared_file: Prepare, write_rows: Write, tokenizer: Any) -> None:
    prepared = prepared_file(write_rows([row(f"q{i}", f"a{i}") for i in range(2500)]))
    assert len(prepared) == len(prepared.lengths) == 2500
    for index in (0, 1023, 1024, 2047, 2048, 2499):
        assert f"q{index}<|im_end|>" in tokenizer.decode(prepared.input_ids[index])
        assert len(prepared.input_ids[index]) == len(prepared.labels[index]) == prepared.lengths[index]
        assert (prepared.labels[index][1:] != -100).sum() == prepared.labelled[index]
    for outside in (-1, 2500):
        with pytest.raises(IndexError, match=f"row {outside} of 2500"):
            prepared.input_ids[outside]


def test_long_rows_are_truncated_and_counted(prepared_file: Prepare, write_rows: Write) -> None:
    prepared = prepared_file(write_rows([row(), row(answer="word " * 100)]), seq_len=32)
    assert (prepared.report.truncated, prepared.report.dropped, len(prepared)) == (1, 0, 2)
    assert prepared.lengths.tolist()[1] == 32
    assert prepared.report.longest > 100
    assert "2 rows (alpaca), 2 kept, 1 truncated;" in prepared.report.sentence()


def test_long_rows_are_dropped_and_counted_on_request(prepared_file: Prepare, write_rows: Write) -> None:
    prepared = prepared_file(write_rows([row(), row(answer="word " * 100)]), seq_len=32, on_long="drop")
    assert (prepared.report.truncated, prepared.report.dropped, len(prepared)) == (0, 1, 1)
    assert "1 dropped as too long" in prepared.report.sentence()


def test_malformed_rows_are_skipped_and_counted_on_request(prepared_file: Prepare, write_rows: Write) -> None:
    rows = [row(), '{"instruction": ', {"instruction": "x"}, row("word " * 60), row()]
    prepared = prepared_file(write_rows(rows), on_malformed="skip", seq_len=32)
    report = prepared.report
    assert (report.rows, report.kept, report.malformed, report.unlabelled) == (5, 2, 2, 1)
    assert "2 skipped as malformed, 1 left out as their answer begins after seq_len" in report.sentence()


def test_counts_add_up(sample: Prepared) -> None:
    report = sample.report
    assert report.rows == report.malformed + report.unlabelled + report.dropped + report.kept
    assert report.tokens == sample.lengths.sum()
    assert report.labelled == sample.labelled.sum()
    assert report.highest_id == max(int(ids.max()) for ids in sample.input_ids)


def test_the_split_is_by_seed_whole_and_disjoint(prepared_file: Prepare) -> None:
    one, same, other = (prepared_file(None, seed=seed, eval_fraction=0.1) for seed in (1, 1, 2))
    assert len(one.eval) == round(255 * 0.1)
    assert sorted([*one.train, *one.eval]) == list(range(255))
    assert np.array_equal(one.eval, same.eval)
    assert not np.array_equal(one.eval, other.eval)
    assert len(prepared_file(None, eval_fraction=0.001).eval) == 1
    assert len(prepared_file(None).eval) == 0
    assert one.eval_labelled == one.labelled[one.eval].sum()


def test_a_split_that_leaves_nothing_is_refused(prepared_file: Prepare, write_rows: Write) -> None:
    text = refused(prepared_file, write_rows([row()]), eval_fraction=0.1)
    assert "holding out 0.1 of 1 samples leaves none to learn from" in text


def test_ids_outside_the_vocabulary_are_refused(sample: Prepared) -> None:
    check_vocabulary(sample, 2048)
    with pytest.raises(DataError, match=r"token id 2047, but the model has vocab_size 1000 \(ids 0 to 999\)"):
        check_vocabulary(replace(sample, report=replace(sample.report, highest_id=2047)), 1000)


def test_files_that_are_none(prepared_file: Prepare, tmp_path: Path) -> None:
    assert "nowhere.json does not exist" in refused(prepared_file, tmp_path / "nowhere.json")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.md").touch()
    text = refused(prepared_file, tmp_path / "none")
    assert "none holds no .json, .jsonl, .parquet, .arrow, .txt file; it holds notes.md" in text
    assert "no data file matches" in refused(prepared_file, tmp_path / "none" / "*.json")
    (tmp_path / "rows.csv").write_text("a,b")
    assert "rows.csv has the unknown extension '.csv'" in refused(prepared_file, tmp_path / "rows.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(prepared_file: Prepare, write_rows: Write) -> None:
    path = write_rows([row()])
    path.chmod(0)
    assert "may not be read by this user" in refused(prepared_file, path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_an_empty_file(prepared_file: Prepare, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.touch()
    assert f"{path} is empty (0 bytes)" in refused(prepared_file, path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b" \n ", "is empty (only white space)"),
        ("b.json", b"hello", "is not JSON data: it begins with 'h'"),
        ("c.json", b"[]", "holds no row"),
        ("d.jsonl", b"\n\n", "holds no row"),
        (
            "e.json",
            b'[{"instruction": "a", "output": "b"},\n {"instr',
            "ends inside the element that begins on line 2; it is trunc",
        ),
        (
            "f.json",
            b'[{"instruction": "a", "output": "b"}',
            "the file ends on line 1 where ']' or ',' should be; the file is trunc",
        ),
        ("g.json", b'[{"instruction": "a", "output": "b"},', "the file ends on line 1 where an element should begin"),
        ("h.json", b'[{"a": 1},\n {"b": }]', "is not valid JSON: line 2: expecting value"),
        ("i.json", b'[{"a": 1}\n {"b": 2}]', "'{' was found on line 2 where ']' or ',' should be"),
        ("j.json", b'[{"a": 1}]\n]', "']' follows the end of the list on line 2"),
        ("k.json", b"[" * 200_000, "is nested too deeply"),
        ("l.json", b'[{"instruction": "\xff"}]', "is not UTF-8 text: byte 0xff cannot be decoded"),
        ("m.jsonl", b"hello\nworld\n", "none of the first 2 rows"),
        ("n.json", b"[1, 2]", "none of the first 2 rows"),
        ("o.jsonl", b'{"a": 1, "b": 2}', "of no known format; found: a, b"),
        ("p.jsonl", b'{"chosen": "a", "rejected": "b"}', "these are preference pairs"),
        ("q.jsonl", b'{"prompt": "a", "completion": "b", "label": true}', "these are rated answers"),
        ("r.parquet", b"PAR1 and then nothing more", "is not a whole Parquet file"),
        ("s.arrow", b"ARROW1 and then nothing more", "is not a whole Arrow file"),
        ("t.arrow", b"something else", "is not a whole Arrow file"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_files_that_cannot_be_read(prepared_file: Prepare, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = refused(prepared_file, path)
    assert expected in text
    assert str(path) in text
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name != "fingerprints"]


def test_a_truncated_table(prepared_file: Prepare, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(f"q{i}") for i in range(5000)])
    path = tmp_path / "cut.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    path.write_bytes(path.read_bytes()[:-60_000])
    assert "is not a whole Arrow file" in refused(prepared_file, path)


def test_bad_rows_are_reported_together_with_their_lines(prepared_file: Prepare, write_rows: Write) -> None:
    rows = [row() for _ in range(40)]
    for place in (2, 4, 6, 8, 10, 12, 14):
        rows[place] = {"instruction": "x"}
    rows[20] = "{broken"
    rows[30] = row(answer="")
    path = write_rows(rows)
    text = refused(prepared_file, path)
    assert "(3 faults)" in text
    assert f'{path}: 7 of 40 rows (lines 3, 5, 7, 9, 11, ...): field "output" missing; columns found: instruction' in text
    assert f"{path}: 1 of 40 rows (line 21): not one whole JSON object on the line" in text
    assert f'{path}: 1 of 40 rows (line 31): field "output" is empty: there is nothing to learn' in text
    assert "mend these rows, or set data.on_malformed=skip to leave them out" in text


def test_many_causes_still_fit_on_a_screen(prepared_file: Prepare, write_rows: Write) -> None:
    rows = [row(), *({"messages": 1, f"column{i}": "x"} for i in range(300))]
    text = refused(prepared_file, write_rows(rows), format="alpaca")
    assert "295 more rows for other causes" in text


def test_tables_count_rows_not_lines(prepared_file: Prepare, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row(), row(answer=""), row(answer="")]), tmp_path / "rows.parquet")
    assert "2 of 3 rows (rows 2, 3): field" in refused(prepared_file, tmp_path / "rows.parquet")


def test_a_row_whose_answer_begins_too_late_is_left_out_and_counted(prepared_file: Prepare, write_rows: Write) -> None:
    prepared = prepared_file(write_rows([row(), row("word " * 60), row("word " * 70)]), seq_len=32)
    assert (prepared.report.kept, prepared.report.unlabelled) == (1, 2)
    assert "2 left out as their answer begins after seq_len" in prepared.report.sentence()


def test_rows_of_only_masked_labels_are_refused(prepared_file: Prepare, write_rows: Write) -> None:
    text = refused(prepared_file, write_rows([row("word " * 60), row("word " * 70)]), seq_len=32)
    assert "2 of 2 rows (lines 1, 2): every label is masked, because the answer begins after seq_len 32" in text
    assert "raise data.seq_len (the longest row has " in text


def test_a_line_that_holds_many_rows_is_named_once(prepared_file: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("word " * 60)] * 9))
    assert "9 of 9 rows (line 1): every label is masked" in refused(prepared_file, path, seq_len=32)


def test_a_file_in_which_nothing_is_learned_is_refused_even_when_skipping(prepared_file: Prepare, write_rows: Write) -> None:
    path = write_rows([row("word " * 60), row("word " * 70)])
    assert "2 of 2 rows (lines 1, 2): every label is masked" in refused(prepared_file, path, seq_len=32, on_malformed="skip")
    text = refused(prepared_file, path, seq_len=32, on_long="drop")
    assert "none of 2 rows is left; 2 are longer than seq_len 32 and dropped" in text
    assert "or set data.on_long=truncate" in text
    path = write_rows([{"instruction": "x"}] * 2)
    text = refused(prepared_file, path, on_malformed="skip")
    assert "2 of 2 rows (lines 1, 2)" in text
    assert "mend these rows" in text
    assert "on_malformed" not in text


def test_a_cache_folder_that_cannot_be_written(write_rows: Write, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*taken.*") as caught:
        prepare(Data(str(write_rows([row()])), 128, cache_dir=str(tmp_path / "taken")), tokenizer, 0, tmp_path)
    assert "set data.cache_dir to a folder that can be written and has room" in str(caught.value)


def test_a_full_disk_leaves_no_half_made_cache(write_rows: Write, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails midway."""
    path = write_rows([row(f"q{i}", "word " * 40) for i in range(1500)])
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from orchestrator.data import load_tokenizer, prepare; from orchestrator.errors import DataError\n"
        "from orchestrator.spec import Data; data = Data(sys.argv[1], 128); tokenizer = load_tokenizer(data, None)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    prepare(data, tokenizer, 0, Path(sys.argv[2]))\n"
        "except DataError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "data.cache_dir" in done.stdout
    assert "has room" in done.stdout
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["fingerprints"]


def test_a_damaged_cache_says_what_to_delete(prepared_file: Prepare, write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([row()])
    folder = tmp_path / "cache" / prepared_file(path).digest
    whole = (folder / "rows.arrow").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (folder / "rows.arrow").write_bytes(content)
        text = refused(prepared_file, path)
        assert f"{folder} is damaged" in text
        assert "delete that folder" in text
    (folder / "rows.arrow").write_bytes(whole)
    (folder / "report.json").write_text(json.dumps({"rows": 1}))
    assert f"{folder} is damaged" in refused(prepared_file, path)
