"""JSON of any form and content: each record is read, or bad with its line, or the file is refused with its line."""

import json
from pathlib import Path

import pytest

from nltrain.data import DataError
from nltrain.data.prepare import PrepareConfig
from tests.data.prepare.support import documents_of, run

TEXTS = [f"document {n} " + "words " * (n % 9) for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text, "n": [n]} for n, text in enumerate(TEXTS)]),
        json.dumps([{"text": text} for text in TEXTS], indent=2),
        "\ufeff \n" + json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
        "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
        "\n".join(json.dumps({"text": text}) for text in TEXTS),
    ],
    ids=["array", "indented array", "byte-order mark", "records over lines", "lines"],
)
def test_a_json_file_is_read_in_each_of_its_forms(corpus: Path, content: str) -> None:
    (corpus / "a.json").write_text(content)
    assert run(corpus).report["documents_in"] == len(TEXTS)
    assert documents_of(corpus.parent / "out") == TEXTS


def test_a_json_array_that_breaks_off_is_named_with_its_line(corpus: Path) -> None:
    (corpus / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)[:-40])
    with pytest.raises(DataError, match=r"a.json:17\d: .*: restore the file"):
        run(corpus)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "good", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "good", "n": ' + b"9" * 10_000 + b"}", None),
        (b'{"text": "good", "n": 1e999, "m": NaN}', None),
        (b'\xef\xbb\xbf{"text": "good"}', "not JSON"),  # a mark that is not at the file's beginning
        (b'{"text": "\\ud83d"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": {"text": "inside"}}', "no text in 'text'"),
        (b'"text"', "no text in 'text'"),
        (b"\0\0\0", "not JSON"),
        (b'{"text": "a\nb"}', "not JSON"),
        (b'{"text": "nul \\u0000 inside"}', None),
        (b'{"text": "' + b"x" * 3000 + b'"}', "longer than prepare.max_record_bytes"),
    ],
)
def test_whatever_a_line_holds_it_is_good_or_bad_with_its_line(corpus: Path, line: bytes, reason: str | None) -> None:
    config = PrepareConfig(
        seq_len=32,
        max_bad_fraction=0.5,
        validation_fraction=0,
        max_record_bytes=2000 if reason and "max" in reason else 1 << 20,
    )
    (corpus / "a.jsonl").write_bytes(LINES + line + b"\n" + LINES)
    done = run(corpus, config=config)
    count = line.count(b"\n") + 1 if reason else 0
    assert done.report["dropped_records"] == ({reason: count} if reason else {})
    assert done.report["documents_in"] == 2 * len(TEXTS) + (0 if reason else 1)
    if reason:
        assert any(f"a.jsonl:{len(TEXTS) + 1}: {reason}" in line for line in done.lines)
