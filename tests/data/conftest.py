"""What the tests of the data share: the built-in tokenizer, files written in place, and the folder of real data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import Prepared, load_tokenizer, prepare
from orchestrator.spec import Data

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(Data(path=None, seq_len=128), None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared folder of real data is not on this machine")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_tokenizer_path() -> Path:
    if not (SHARED / "tokenizer").is_dir():
        pytest.skip("the shared folder with a real tokenizer is not on this machine")
    return SHARED / "tokenizer"


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines; a row that is a string is written as it stands."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared_file(tmp_path: Path, tokenizer: Any) -> Callable[..., Prepared]:
    """Prepares a file with the built-in tokenizer; keyword arguments are those of `Data`."""

    def make(path: Path | None, *, seed: int = 0, **options: Any) -> Prepared:
        data = Data(**{"path": str(path) if path else None, "seq_len": 128, **options})
        return prepare(data, tokenizer, seed, tmp_path / "cache")

    return make


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Prepared:
    """The built-in sample with 23 of its samples held out."""
    data = Data(path=None, seq_len=128, eval_fraction=0.09)
    return prepare(data, tokenizer, 7, tmp_path_factory.mktemp("sample"))
