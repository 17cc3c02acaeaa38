"""Bad records: counted over the whole input, reported with file and line, and too many of them stop the work."""

import gzip
import json
from pathlib import Path

import pytest

from nltrain.data import DataError
from nltrain.data.prepare import PrepareConfig
from tests.data.prepare.support import run

TEXTS = [f"document {n}\n" + "some words in a row, " * (n % 17) + "é世界" * (n % 3) for n in range(90)]


def test_one_empty_text_of_many_is_judged_over_the_whole_input(corpus: Path) -> None:
    for part in range(20):
        lines = [json.dumps({"text": f"text {part} {n}"}) for n in range(200)]
        if part == 3:
            lines[7] = json.dumps({"text": ""})
        (corpus / f"{part:02d}.jsonl").write_text("\n".join(lines))
    done = run(corpus)
    assert done.report["records_in"] == 4000 and done.report["dropped_records"] == {"empty text": 1}
    assert any("03.jsonl:8: empty text" in line for line in done.lines)


def test_many_bad_records_at_the_start_do_not_stop_what_can_still_pass(corpus: Path) -> None:
    config = PrepareConfig(seq_len=32, max_bad_fraction=0.3, validation_fraction=0)
    (corpus / "a.jsonl").write_text("no JSON\n" * 1500)
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 3400))
    with pytest.raises(DataError, match=r"max_bad_fraction: 0.3: 1500 of 4900 records are bad, first: .*a.jsonl:1: "):
        run(corpus, config=config)
    assert not (corpus.parent / "out" / "manifest.json").exists()
    # What was done is kept: a higher limit finishes at once.
    config = PrepareConfig(seq_len=32, max_bad_fraction=0.31, validation_fraction=0)
    before = {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").rglob("*.tar")}
    assert run(corpus, config=config).report["dropped_records"] == {"not JSON": 1500}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_input_that_can_no_longer_pass_is_given_up_early(corpus: Path) -> None:
    for part in range(30):
        (corpus / f"{part:02d}.jsonl").write_text('{"content": "in another field"}\n' * 200)
    lines: list[str] = []
    with pytest.raises(DataError, match=r"at most 1\d may be, first: .*00.jsonl:1: no text in 'text'"):
        run(corpus, lines=lines)
    assert not any("groups," in line for line in lines)


def test_bad_records_are_counted_reported_with_their_line_and_stop_the_work_over_a_threshold(corpus: Path) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = [
        b"{not json",
        b'{"other": "x"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
    ]
    (corpus / "mixed.jsonl").write_bytes(b"\n".join([*good[:10], *bad, *good[10:]]) + b"\n")
    (corpus / "latin.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(
        DataError,
        match=r"max_bad_fraction: 0.001: 2 records are bad, and of all .* at most 1 may be, first: .*:11: not JSON",
    ):
        run(corpus)
    done = run(corpus, PrepareConfig(seq_len=32, max_bad_fraction=0.2))
    report = done.report
    assert report["records_in"] == 97 and report["documents_in"] == 90
    assert report["dropped_records"] == {
        "empty text": 1,
        "no text in 'text'": 2,
        "not JSON": 1,
        "not UTF-8": 3,
    }
    for number in range(11, 17):
        assert any(f"mixed.jsonl:{number}: " in line for line in done.lines)
    assert any("latin.txt:2: not UTF-8" in line for line in done.lines)
