"""For generated inputs, any JSON value and any bytes: what prepare writes and reports adds up to what went in."""

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nltrain.data import DataError, TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.tokenizer import DocumentEncoder, tokenizer_to_bytes
from tests.data.support import TOKENIZER

CONFIG = PrepareConfig(
    seq_len=16, validation_fraction=0.3, max_bad_fraction=1.0, group_bytes=200, max_record_bytes=4000
)
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=9,
)
# Surrogates too: JSON can spell them.
texts = st.text(st.characters(), max_size=200) | st.sampled_from(["", "x", "\ud800", "<|endoftext|>", "long " * 1000])
records = st.builds(
    lambda rest, text: rest | {"text": text}, st.dictionaries(st.text(max_size=5), values, max_size=3), texts
)
json_lines = st.builds(lambda value, ascii: json.dumps(value, ensure_ascii=ascii), records | values, st.booleans()).map(
    lambda line: line.encode("utf-8", "surrogatepass")
)
odd_lines = st.sampled_from(
    [
        b"[" * 200_000,
        b'{"text": "a", "n": ' + b'{"n": ' * 50_000 + b"1" + b"}" * 50_001,
        b'{"text": "huge", "n": ' + b"7" * 3900 + b"}",
        b'{"text": "twice", "text": ""}',
        b'"text"',
        b"\xef\xbb\xbf{}",
        b"\0",
        b"\r",
        b" ",
    ]
)
plain_texts = st.binary(max_size=80) | st.text(max_size=80).map(str.encode)
lines = st.lists(json_lines | odd_lines | st.binary(max_size=60), max_size=12)


def good_text(line: bytes) -> str | None:
    """What a line of JSON is worth, by the definition: an object with a text that is Unicode."""
    try:
        text = json.loads(line.decode(), parse_int=float)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text or None


def expected(content: bytes) -> tuple[list[str], list[int]]:
    """(the good texts, the numbers of the bad lines) of a .jsonl file."""
    good, bad = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
            continue
        text = good_text(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        if text is None or len(line) > CONFIG.max_record_bytes:
            bad.append(number)
        else:
            good.append(text)
    return good, bad


def pack(suffix: str, data: bytes, first: int) -> bytes:
    """The data compressed as two streams, as `cat a.gz b.gz` makes them: the first one of `first` bytes."""
    return PACK[suffix](data[:first]) + PACK[suffix](data[first:])


def run(files: dict[str, bytes]) -> tuple[Any, list[str], list[int]] | str:
    """(report, lines, all tokens of the dataset, sorted), or the error's one line."""
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for name, data in files.items():
            (corpus / name).write_bytes(data)
        Path(folder, "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
        try:
            manifest = prepare_files(
                [str(corpus)], f"{folder}/out", CONFIG, tokenizer=f"{folder}/tokenizer.json", progress=said.append
            )
        except DataError as error:
            assert "\n" not in str(error)
            return str(error)
        tokens: list[int] = []
        for split in (name for name, found in manifest.splits.items() if found.shards):
            dataset = TokenDataset.open(f"{folder}/out", split)
            for shard in range(len(dataset.shards)):
                tokens += shard_tokens(dataset, shard)
        return manifest.report, said, sorted(tokens)


def shard_tokens(dataset: TokenDataset, shard: int) -> list[int]:
    data = memoryview(dataset.store.get(dataset.shards[shard].key))
    found: list[int] = []
    for member in dataset.index(shard).members:
        start, length = member.tokens.offset, member.tokens.num_bytes
        cells = data[start : start + length].cast("H")[: member.num_tokens].tolist()
        found += cells[len(found) > 0 or shard_continues(dataset, shard) :]
    return found


def shard_continues(dataset: TokenDataset, shard: int) -> bool:
    """Whether its first token is the last one of the shard before, of the same group."""
    return not dataset.shards[shard].key.endswith("-00000.tar")


@settings(max_examples=60)
@given(lines, st.lists(plain_texts, max_size=2), st.sampled_from([*PACK]), st.integers(0, 300))
def test_tokens_out_and_reported_drops_are_what_went_in(
    content: list[bytes], plain: list[bytes], suffix: str, first: int
) -> None:
    data = b"\n".join(content)
    files = {f"a.jsonl{suffix}": pack(suffix, data, first)} | {f"{n}.txt": text for n, text in enumerate(plain)}
    result = run(files)
    good, bad = expected(data)
    bad_texts = 0
    for text in plain:
        try:
            good += [text.decode()] * bool(text)
        except UnicodeDecodeError:
            bad_texts += 1
    if isinstance(result, str):
        assert not good and ("hold no tokens" in result or "with anything in it" in result), result
        return
    report, said, tokens = result
    encoded = DocumentEncoder(TOKENIZER).encode(good)
    assert tokens == sorted(token for document in encoded for token in document.tolist())
    assert report["tokens_in"] == report["tokens_out"] == len(tokens)
    assert report["documents_in"] == len(good)
    assert sum(report["dropped_records"].values()) == len(bad) + bad_texts
    assert report["records_in"] == len(good) + len(bad) + bad_texts
    for number in bad:
        assert any(line.startswith("dropped: ") and f"a.jsonl{suffix}:{number}: " in line for line in said)
    for line in said:
        assert line.isprintable()


@settings(max_examples=120)
@given(
    st.sampled_from([".json", ".jsonl", ".ndjson", ".txt", ".md", ".parquet"]),
    st.sampled_from([*PACK]),
    st.binary(max_size=300)
    | values.map(lambda value: json.dumps(value, indent=1).encode("utf-8", "surrogatepass"))
    | st.lists(records, max_size=5).map(lambda value: json.dumps(value).encode()),
    st.integers(0, 400),
    st.booleans(),
    st.integers(0, 50),
)
def test_any_bytes_under_any_name_are_a_dataset_that_adds_up_or_one_line(
    kind: str, suffix: str, data: bytes, cut: int, packed: bool, first: int
) -> None:
    content = (pack(suffix, data, first) if packed else data)[:cut]
    result = run({f"a{kind}{suffix}": content, "good.txt": b"a good text"})
    if isinstance(result, str):
        assert f"a{kind}{suffix}" in result and ": " in result
        return
    report, said, tokens = result
    assert report["tokens_in"] == report["tokens_out"] == len(tokens) >= 4
    num_bad = sum(report["dropped_records"].values())
    assert report["records_in"] == report["documents_in"] + num_bad
    assert sum(line.startswith("dropped: ") for line in said) == num_bad


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_record_at_the_longest_size_is_good_and_one_byte_more_is_bad(kind: str) -> None:
    def line(num_bytes: int) -> bytes:
        return b'{"text": "' + b"x" * (num_bytes - 12) + b'"}'

    longest = CONFIG.max_record_bytes
    result = run({f"a{kind}": b"\n".join([line(longest), line(longest + 1), line(50), b""])})
    assert not isinstance(result, str)
    assert result[0]["documents_in"] == 2
    assert result[0]["dropped_records"] == {"longer than prepare.max_record_bytes": 1}


@settings(max_examples=60)
@given(
    st.lists(texts.filter(lambda text: good_text(json.dumps({"text": text}).encode()) is not None), min_size=1),
    st.sampled_from([None, 0, 1]),
    st.sampled_from(["", " ", "\n\t", "\ufeff", "\ufeff \n"]),
    st.sampled_from([*PACK]),
    st.integers(0, 30),
)
def test_a_json_array_gives_all_its_texts(
    good: list[str], indent: int | None, before: str, suffix: str, first: int
) -> None:
    data = (before + json.dumps([{"text": text} for text in good], indent=indent)).encode()
    result = run({f"a.json{suffix}": pack(suffix, data, first)})
    assert not isinstance(result, str)
    report, _, tokens = result
    assert report["documents_in"] == report["records_in"] == len(good)
    encoded = DocumentEncoder(TOKENIZER).encode(good)
    assert tokens == sorted(token for document in encoded for token in document.tolist())
