"""Documents in files: text columns of any type, long documents in passages, memory that does not grow with them."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nltrain.data import DataError, TokenDataset
from nltrain.data.prepare import PrepareConfig, sources
from nltrain.data.tokenizer import DocumentEncoder, tokenizer_to_bytes
from tests.data.prepare.support import ROOT, documents_of, run
from tests.data.support import TOKENIZER


@pytest.mark.parametrize(
    ("column", "kind"),
    [(pyarrow.array([1, 2]), "int64"), (pyarrow.array([["a"], ["b"]]), "list<.*>"), (pyarrow.array([b"a"]), "binary")],
)
def test_a_column_of_the_wrong_type_is_named_with_its_type(corpus: Path, column: Any, kind: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), corpus / "a.parquet")
    with pytest.raises(DataError, match=rf"a.parquet: column 'text' holds {kind}, not text .*set prepare.text_field"):
        run(corpus)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_each_type_of_text_column_is_read_and_a_cell_that_is_no_text_dropped(corpus: Path, kind: Any) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")],
    )
    cells = pyarrow.concat_arrays([broken, pyarrow.array([None, "", "c"], pyarrow.string())])
    cells = cells.dictionary_encode() if kind == "dictionary" else cells.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": cells}), corpus / "a.parquet")
    done = run(corpus, config=PrepareConfig(seq_len=32, max_bad_fraction=0.6, validation_fraction=0))
    assert documents_of(corpus.parent / "out") == ["a", "b", "c"]
    assert done.report["dropped_records"] == {"empty text": 1, "no text in 'text'": 1, "not UTF-8": 1}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-30], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstandard at all", "a.jsonl.zst: cannot be read"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: cannot be read as parquet"),
    ],
)
def test_a_damaged_file_stops_the_work_with_its_url(corpus: Path, name: str, data: bytes, says: str) -> None:
    (corpus / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        run(corpus)


def test_a_parquet_file_without_the_column_names_those_it_has(corpus: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"]}), corpus / "e.parquet")
    with pytest.raises(DataError, match=r"e.parquet: no column 'content', it has id, text: set prepare.text_field"):
        run(corpus, PrepareConfig(seq_len=32, text_field="content", max_bad_fraction=1.0))


def tokens_of(url: Path) -> np.ndarray:
    return np.concatenate(list(TokenDataset.open(str(url)).tokens_by_group()))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json"])
def test_a_long_document_in_passages_has_the_tokens_of_the_whole(
    corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    text = "".join(rng.choice(["word", "  two words", "\n\tline.\n", "é世界", " 12", "end\nnext"]) for _ in range(4000))
    data = text if ".txt" in name else json.dumps({"text": text, "n": 1}) + "\n" + json.dumps({"text": "short"}) + "\n"
    (corpus / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    monkeypatch.setattr(sources, "PASSAGE_CHARS", 1000)
    monkeypatch.setattr(sources, "WHOLE_TEXT_BYTES", 777)  # a character may be cut where a part ends
    report = run(corpus).report
    whole = DocumentEncoder(TOKENIZER).encode([text] if ".txt" in name else [text, "short"])
    assert np.array_equal(tokens_of(corpus.parent / "out"), np.concatenate(whole))
    assert report["documents_in"] == report["records_in"] == len(whole)


def test_a_long_text_that_is_no_utf8_near_its_end_gives_nothing_and_names_the_line(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "WHOLE_TEXT_BYTES", 1000)
    (corpus / "a.txt").write_bytes("é\n".encode() * 2000 + b"\xc3")
    (corpus / "b.txt").write_text("good")
    done = run(corpus, PrepareConfig(seq_len=32, validation_fraction=0, max_bad_fraction=0.5))
    assert done.report["dropped_records"] == {"not UTF-8": 1} and any(
        "a.txt:2001: not UTF-8" in line for line in done.lines
    )
    assert done.report["tokens_out"] == len(DocumentEncoder(TOKENIZER).encode(["good"])[0])


PEAK = """
import resource, sys
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.prepare.inputs import list_inputs
from nltrain.data.prepare.sources import Dropped, read_documents
for folder in sys.argv[2:]:
    if sys.argv[1] == "encode":
        config = PrepareConfig(seq_len=32, validation_fraction=0, max_bad_fraction=0.9)
        tokenizer = folder + "/../tokenizer.json"
        prepare_files([folder], folder + "-out", config, tokenizer=tokenizer, progress=lambda _: None)
    else:
        for passage in read_documents(list_inputs([folder], lambda _: None), "text", Dropped(), 4 << 20):
            pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def growth_bytes(mode: str, small: Path, large: Path) -> int:
    """How much the peak memory of a process grows when it reads the large folder after the small one."""
    command = [sys.executable, "-c", PEAK, mode, str(small), str(large)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    return after - before


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A small and a large folder, and a tokenizer beside them."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    return tmp_path / "small", tmp_path / "large"


def test_memory_of_reading_does_not_grow_with_the_longest_document(folders: tuple[Path, Path]) -> None:
    for folder, megabytes in zip(folders, (4, 60), strict=True):
        part = b"some words, " * (1 << 16)
        count = (megabytes << 20) // len(part)
        (folder / "a.txt.zst").write_bytes(zstandard.compress(part * count))
        record = b'{"text": "' + part * count + b'"}\n'
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(record, 1))
        (folder / "c.txt").write_bytes(part * count)
        (folder / "d.jsonl").write_bytes(b"\xff" * (megabytes << 20))
    assert growth_bytes("read", *folders) < 30 << 20


def test_memory_of_encoding_does_not_grow_with_the_longest_document(folders: tuple[Path, Path]) -> None:
    for folder, megabytes in zip(folders, (2, 6), strict=True):
        (folder / "a.txt").write_bytes(b"word" * (megabytes << 18))
    assert growth_bytes("encode", *folders) < 30 << 20
