"""A dataset opens by its manifest alone; what was damaged since is refused with its URL."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nltrain.data import DataError, TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_tokens
from nltrain.store import open_store
from tests.data.support import TOKENIZER, make_dataset


def flip_a_bit_of_member_2(dataset: TokenDataset, folder: Path) -> Path:
    path = folder / dataset.shards[0].key
    damaged = bytearray(path.read_bytes())
    damaged[dataset.index(0).members[2].tokens.offset + 5] ^= 4
    path.write_bytes(damaged)
    return path


def flip_a_bit_of_a_header(dataset: TokenDataset, folder: Path) -> Path:
    path = folder / dataset.shards[0].key
    path.write_bytes(b"x" + path.read_bytes()[1:])
    return path


def truncate_the_shard(dataset: TokenDataset, folder: Path) -> Path:
    path = folder / dataset.shards[0].key
    path.write_bytes(path.read_bytes()[:-20])
    return path


def truncate_the_index(dataset: TokenDataset, folder: Path) -> Path:
    path = folder / dataset.shards[0].index_key
    path.write_bytes(path.read_bytes()[:-20])
    return path


def alter_the_tokenizer(dataset: TokenDataset, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    return path


@pytest.mark.parametrize(
    ("damage", "use", "says"),
    [
        (flip_a_bit_of_member_2, lambda dataset: list(dataset.sequences()), r"checksum mismatch \(member 000002\)"),
        (flip_a_bit_of_member_2, lambda dataset: list(dataset.tokens_by_group()), r"checksum mismatch \(member 000002"),
        (flip_a_bit_of_a_header, lambda dataset: list(dataset.sequences()), r"checksum mismatch \(tar headers\)"),
        (truncate_the_shard, lambda dataset: list(dataset.sequences()), r"checksum mismatch \(\d+ of \d+ bytes\)"),
        (truncate_the_index, lambda dataset: dataset.index(0), r"the index \(\d+ bytes\) is truncated or altered"),
        (alter_the_tokenizer, lambda dataset: dataset.tokenizer(), r"altered since the dataset was prepared"),
    ],
)
def test_a_damaged_file_is_refused_with_its_url(
    tmp_path: Path,
    damage: Callable[[TokenDataset, Path], Path],
    use: Callable[[TokenDataset], object],
    says: str,
) -> None:
    make_dataset(str(tmp_path), 60, bytes_per_shard=1 << 16)
    path = damage(TokenDataset.open(str(tmp_path)), tmp_path)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: {says}"):
        use(TokenDataset.open(str(tmp_path)))


@pytest.mark.parametrize(
    ("folder", "split", "says"),
    [
        ("none", "train", "none/manifest.json: no prepared dataset there"),
        ("set", "test", "data.split: 'test' is not in .*/set: it has train, validation"),
        ("set", "validation", "set: split 'validation' holds no sequences: .*larger validation_fraction"),
    ],
    ids=["no dataset", "no such split", "empty split"],
)
def test_what_is_not_there_is_named(tmp_path: Path, folder: str, split: str, says: str) -> None:
    make_dataset(str(tmp_path / "set"), 60)
    with pytest.raises(DataError, match=says):
        TokenDataset.open(str(tmp_path / folder), split)


def test_the_tokens_of_a_group_are_those_of_its_documents_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 200, length) for length in (5, 1, 170, 33)]
    config = PrepareConfig(seq_len=16, bytes_per_member=64, bytes_per_shard=200, validation_fraction=0.0)
    named = [(str(n), tokens) for n, tokens in enumerate(documents)]
    prepare_tokens(named, open_store(str(tmp_path)), TOKENIZER, config)
    dataset = TokenDataset.open(str(tmp_path))
    assert len(dataset.shards) > 2
    groups = list(dataset.tokens_by_group())
    assert len(groups) == 1 and np.array_equal(groups[0], np.concatenate(documents))
    assert dataset.num_tokens == sum(map(len, documents)) == dataset.num_targets + 1
