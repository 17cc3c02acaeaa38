"""Documents of any length and tokenizers of any kind: bounded time and memory, nothing lost that is not counted."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from nltrain.data import DataError, TokenDataset, train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare_files, sources
from nltrain.data.prepare.inputs import list_inputs
from nltrain.data.tokenizer import LONGEST_WORD_CHARS, DocumentEncoder, tokenizer_to_bytes
from tests.data.support import TOKENIZER

ROOT = Path(__file__).resolve().parents[2]
CONFIG = PrepareConfig(seq_len=32, validation_fraction=0.0)


def prepared(folder: Path, tokenizer: Tokenizer | None = None, config: PrepareConfig = CONFIG) -> tuple[Any, list[str]]:
    """(report, lines) of folder/corpus."""
    said: list[str] = []
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer_to_bytes(tokenizer))
    source = str(folder / "tokenizer.json") if tokenizer is not None else ""
    manifest = prepare_files([f"{folder}/corpus"], f"{folder}/out", config, tokenizer=source, progress=said.append)
    return manifest.report, said


def tokens_of(url: str) -> np.ndarray:
    parts = [
        sequence.tokens[bool(n) : sequence.num_targets + 1]
        for n, sequence in enumerate(TokenDataset.open(url).sequences())
    ]
    return np.concatenate(parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path


# Time or memory without a bound for one document.


@pytest.mark.parametrize("alphabet", ["abcdefghijklmnopqrstuvwxyz", " \t", "0123456789", "ACGT", "=-", "世界人"])
def test_one_word_of_two_megabytes_trains_a_tokenizer_in_seconds(folder: Path, alphabet: str) -> None:
    word = "".join(random.Random(0).choices(alphabet, k=(2 << 20) // len(alphabet[0].encode())))
    (folder / "corpus" / "word.txt").write_text(word)
    (folder / "corpus" / "normal.txt").write_text("a few words of a normal text\n" * 100)
    started_s = time.process_time()
    cut: list[int] = []
    files = list_inputs([f"{folder}/corpus"], lambda _: None)
    texts = [piece.text for piece in sources.read_documents(files, "text", sources.Dropped(), 1 << 30)]
    tokenizer = train_tokenizer(texts, 32768, cut.append)
    assert time.process_time() - started_s < 30
    assert sum(cut) > 0.9 * (len(word) - len(texts) * LONGEST_WORD_CHARS)
    assert {"normal", "words"} <= {token.strip("Ġ") for token in tokenizer.get_vocab()}


def test_what_is_cut_for_training_a_tokenizer_is_said_and_stays_in_the_dataset(folder: Path) -> None:
    word = "x" * 300_000
    (folder / "corpus" / "a.txt").write_text(word)
    report, said = prepared(folder)
    assert any(f"words of more than 256 characters were cut in 1 texts, {300_000 - 256} characters" in s for s in said)
    dataset = TokenDataset.open(str(folder / "out"))
    assert dataset.tokenizer().decode(tokens_of(str(folder / "out"))[1:].tolist()) == word
    assert report["tokens_in"] == report["tokens_out"] == dataset.manifest.splits["train"].num_tokens


def test_a_text_without_long_words_trains_the_tokenizer_that_it_always_did() -> None:
    texts = ["def f(x):\n        return x ** 2  # " + "-" * 200 + "\n", "é 世界" * 50 + " " * 256]
    tokenizer = Tokenizer.from_str(train_tokenizer(texts, 400).to_str())
    again = train_tokenizer(texts, 400, report_cut=lambda _: pytest.fail("nothing is to be cut"))
    assert tokenizer.to_str() == again.to_str()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json"])
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    text = "".join(rng.choice(["word", "  two words", "\n\tline.\n", "é世界", " 12", "end\nnext"]) for _ in range(4000))
    data = text if ".txt" in name else json.dumps({"text": text, "n": 1}) + "\n" + json.dumps({"text": "short"}) + "\n"
    (folder / "corpus" / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    monkeypatch.setattr(sources, "PIECE_CHARS", 1000)
    monkeypatch.setattr(sources, "WHOLE_TEXT_BYTES", 777)  # a character may be cut where a part ends
    report, _ = prepared(folder, TOKENIZER)
    whole = DocumentEncoder(TOKENIZER).encode([text] if ".txt" in name else [text, "short"])
    assert np.array_equal(tokens_of(str(folder / "out")), np.concatenate(whole))
    assert report["documents_in"] == report["records_in"] == len(whole)


def test_a_long_text_that_is_no_utf8_near_its_end_gives_nothing_and_names_the_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "WHOLE_TEXT_BYTES", 1000)
    (folder / "corpus" / "a.txt").write_bytes("é\n".encode() * 2000 + b"\xc3")
    (folder / "corpus" / "b.txt").write_text("good")
    report, said = prepared(folder, TOKENIZER, PrepareConfig(seq_len=32, validation_fraction=0, max_bad_fraction=0.5))
    assert report["dropped_records"] == {"not UTF-8": 1} and any("a.txt:2001: not UTF-8" in line for line in said)
    assert report["tokens_out"] == len(DocumentEncoder(TOKENIZER).encode(["good"])[0])


PEAK = """
import resource, sys
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.prepare.inputs import list_inputs
from nltrain.data.prepare.sources import Dropped, read_documents
folder, encode = sys.argv[1:]
if encode == "encode":
    config = PrepareConfig(seq_len=32, validation_fraction=0, max_bad_fraction=0.9)
    prepare_files([folder], folder + "-out", config, tokenizer=folder + "/../tokenizer.json", progress=lambda _: None)
else:
    dropped = Dropped()
    n = sum(len(p.text) for p in read_documents(list_inputs([folder], lambda _: None), "text", dropped, 4 << 20))
    print(n, dict(dropped.by_reason))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def peak_bytes(folder: Path, mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), mode], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_longest_document(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(tokenizer_to_bytes(TOKENIZER))
    small, large = folder / "small", folder / "large"
    for place, megabytes in ((small, 4), (large, 60)):
        place.mkdir()
        part = b"some words, " * (1 << 16)
        count = (megabytes << 20) // len(part)
        (place / "a.txt.zst").write_bytes(zstandard.compress(part * count))
        record = b'{"text": "' + part * count + b'"}\n'
        (place / "b.jsonl.gz").write_bytes(gzip.compress(record, 1))
        (place / "c.txt").write_bytes(part * count)
        (place / "d.jsonl").write_bytes(b"\xff" * (megabytes << 20))
    assert peak_bytes(large, "read") - peak_bytes(small, "read") < 30 << 20
    for place, megabytes in ((small, 2), (large, 6)):
        for path in place.iterdir():
            path.unlink()
        (place / "a.txt").write_bytes(b"word" * (megabytes << 18))
    assert peak_bytes(large, "encode") - peak_bytes(small, "encode") < 30 << 20


# Tokenizers.


def word_level(unknown: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "known": 1, "[UNK]": 2}, unk_token=unknown or "none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram(unk_id: int | None) -> Tokenizer:
    return Tokenizer(models.Unigram([("<|endoftext|>", 0.0), ("k", -1.0), ("n", -1.0), ("?", -9.0)], unk_id=unk_id))


def characters() -> Tokenizer:
    """BPE over characters, without an unknown token and without bytes: what it lacks leaves no trace."""
    vocabulary = {c: n for n, c in enumerate(["<|endoftext|>", "k", "n", "o", "w", " "])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


RECORDS = ["known known", "known or not", "known"]
LENIENT = PrepareConfig(seq_len=32, validation_fraction=0.0, max_bad_fraction=0.4)


def write_records(folder: Path, texts: list[str]) -> None:
    (folder / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [(word_level(None), RECORDS), (unigram(None), ["knn", "known", "n"])],
    ids=["words", "unigram"],
)
def test_a_text_that_a_tokenizer_cannot_encode_is_a_bad_record(
    folder: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    write_records(folder, texts)
    with pytest.raises(DataError, match=r"1 records are bad, .*: .*a.jsonl:2: the tokenizer cannot encode it \(.*\):"):
        prepared(folder, tokenizer)
    report, said = prepared(folder, tokenizer, LENIENT)
    assert report["documents_in"] == 2 and report["records_in"] == 3
    assert report["tokens_in"] == report["tokens_out"] and sum(report["dropped_records"].values()) == 1
    assert any("a.jsonl:2: the tokenizer cannot encode it" in line for line in said)


@pytest.mark.parametrize(
    ("tokenizer", "unknown"), [(word_level("[UNK]"), 2), (unigram(3), 4)], ids=["words", "unigram"]
)
def test_unknown_tokens_are_counted(folder: Path, tokenizer: Tokenizer, unknown: int) -> None:
    write_records(folder, RECORDS if unknown == 2 else ["kXn", "kn", "YnZ", "n世界n"])
    report, said = prepared(folder, tokenizer)
    # A unigram tokenizer takes neighbouring unknown characters together.
    assert report["unknown_tokens"] == unknown
    assert any(f"{unknown} tokens (" in line and "unknown token" in line for line in said)


def test_characters_that_leave_no_token_are_counted_and_a_text_of_them_alone_is_dropped(folder: Path) -> None:
    write_records(folder, ["known wé n", "éé世", "now é"])
    report, said = prepared(
        folder, characters(), PrepareConfig(seq_len=32, validation_fraction=0, separator=None, max_bad_fraction=0.4)
    )
    assert report["characters_without_token"] == {"é": 4, "世": 1}
    assert report["dropped_records"] == {"no token for any of its characters": 1}
    assert any(line.startswith("warning: the tokenizer has no token for 2 characters") for line in said)
    assert report["tokens_in"] == report["tokens_out"] == len("known w n") + len("now ")


def test_a_byte_level_tokenizer_loses_nothing_and_is_not_watched() -> None:
    encoder = DocumentEncoder(TOKENIZER)
    text = "\0\x01é世\U0010ffff\u0378 \ue000"
    assert TOKENIZER.decode(encoder.encode([text])[0][1:].tolist()) == text
    assert not encoder.losses.characters and not encoder.losses.num_unknown


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{}", "not a Hugging Face tokenizer.json"),
        (b"\xff\xfe", "not a Hugging Face tokenizer.json"),
        (b"", "not a Hugging Face tokenizer.json"),
        (Tokenizer(models.BPE()).to_str().encode(), "it has no tokens at all"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode(), "'<|endoftext|>' is no token of this"),
    ],
)
def test_what_is_no_tokenizer_for_this_is_refused_in_one_line(folder: Path, data: bytes, says: str) -> None:
    write_records(folder, RECORDS)
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError) as error:
        prepare_files(
            [f"{folder}/corpus"], f"{folder}/out", CONFIG, tokenizer=f"{folder}/tokenizer.json", progress=lambda _: None
        )
    assert says in str(error.value) and "\n" not in str(error.value)
