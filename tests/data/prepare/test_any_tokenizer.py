"""Preparing with tokenizers of any kind: trained in bounded time, and what they cannot encode is counted."""

import json
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from nltrain.data import DataError, train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare_files, sources
from nltrain.data.prepare.inputs import list_inputs
from nltrain.data.tokenizer import LONGEST_WORD_CHARS
from tests.data.prepare.support import CONFIG, documents_of, run


@pytest.mark.parametrize("alphabet", ["abcdefghijklmnopqrstuvwxyz", " \t", "0123456789", "ACGT", "=-", "世界人"])
def test_one_word_of_two_megabytes_trains_a_tokenizer_in_seconds(corpus: Path, alphabet: str) -> None:
    word = "".join(random.Random(0).choices(alphabet, k=(2 << 20) // len(alphabet[0].encode())))
    (corpus / "word.txt").write_text(word)
    (corpus / "normal.txt").write_text("a few words of a normal text\n" * 100)
    started_s = time.process_time()
    cut: list[int] = []
    files = list_inputs([str(corpus)], lambda _: None)
    texts = [passage.text for passage in sources.read_documents(files, "text", sources.Dropped(), 1 << 30)]
    tokenizer = train_tokenizer(texts, 32768, cut.append)
    assert time.process_time() - started_s < 30
    assert sum(cut) > 0.9 * (len(word) - len(texts) * LONGEST_WORD_CHARS)
    assert {"normal", "words"} <= {token.strip("Ġ") for token in tokenizer.get_vocab()}


def test_what_is_cut_for_training_a_tokenizer_is_said_and_stays_in_the_dataset(corpus: Path) -> None:
    word = "x" * 300_000
    (corpus / "a.txt").write_text(word)
    done = run(corpus, CONFIG, tokenizer=None)
    says = f"words of more than 256 characters were cut in 1 texts, {300_000 - 256} characters"
    assert any(says in line for line in done.lines)
    assert documents_of(corpus.parent / "out") == [word]
    assert done.report["tokens_in"] == done.report["tokens_out"] == done.manifest.splits["train"].num_tokens


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


def write_records(corpus: Path, texts: list[str]) -> None:
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [(word_level(None), RECORDS), (unigram(None), ["knn", "known", "n"])],
    ids=["words", "unigram"],
)
def test_a_text_that_a_tokenizer_cannot_encode_is_a_bad_record(
    corpus: Path, tokenizer: Tokenizer, texts: list[str]
) -> None:
    write_records(corpus, texts)
    with pytest.raises(DataError, match=r"1 records are bad, .*: .*a.jsonl:2: the tokenizer cannot encode it \(.*\):"):
        run(corpus, CONFIG, tokenizer=tokenizer)
    done = run(corpus, LENIENT, tokenizer=tokenizer)
    assert done.report["documents_in"] == 2 and done.report["records_in"] == 3
    assert done.report["tokens_in"] == done.report["tokens_out"] and sum(done.report["dropped_records"].values()) == 1
    assert any("a.jsonl:2: the tokenizer cannot encode it" in line for line in done.lines)


@pytest.mark.parametrize(
    ("tokenizer", "unknown"), [(word_level("[UNK]"), 2), (unigram(3), 4)], ids=["words", "unigram"]
)
def test_unknown_tokens_are_counted(corpus: Path, tokenizer: Tokenizer, unknown: int) -> None:
    write_records(corpus, RECORDS if unknown == 2 else ["kXn", "kn", "YnZ", "n世界n"])
    done = run(corpus, CONFIG, tokenizer=tokenizer)
    # A unigram tokenizer takes neighbouring unknown characters together.
    assert done.report["unknown_tokens"] == unknown
    assert any(f"{unknown} tokens (" in line and "unknown token" in line for line in done.lines)


def test_characters_that_leave_no_token_are_counted_and_a_text_of_them_alone_is_dropped(corpus: Path) -> None:
    write_records(corpus, ["known wé n", "éé世", "now é"])
    config = PrepareConfig(seq_len=32, validation_fraction=0, separator=None, max_bad_fraction=0.4)
    done = run(corpus, config, tokenizer=characters())
    assert done.report["characters_without_token"] == {"é": 4, "世": 1}
    assert done.report["dropped_records"] == {"no token for any of its characters": 1}
    assert any(line.startswith("warning: the tokenizer has no token for 2 characters") for line in done.lines)
    assert done.report["tokens_in"] == done.report["tokens_out"] == len("known w n") + len("now ")


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
def test_what_is_no_tokenizer_for_this_is_refused_in_one_line(corpus: Path, data: bytes, says: str) -> None:
    write_records(corpus, RECORDS)
    (corpus.parent / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError) as error:
        prepare_files(
            [str(corpus)],
            f"{corpus.parent}/out",
            CONFIG,
            tokenizer=f"{corpus.parent}/tokenizer.json",
            progress=lambda _: None,
        )
    assert says in str(error.value) and "\n" not in str(error.value)
