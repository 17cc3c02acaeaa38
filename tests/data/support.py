"""Datasets of known tokens for the tests of this room."""

from pathlib import Path
from typing import Any

import numpy as np

from nltrain.data import Batch, SampleOrder, TokenDataset, train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare_tokens
from nltrain.store import open_store

VOCABULARY = 300
TOKENIZER = train_tokenizer(["a few words, not many, and a few more"], VOCABULARY)


def make_dataset(url: str, num_sequences: int, seq_len: int = 16, seed: int = 0, **options: Any) -> TokenDataset:
    """Random documents of 1 to 60 tokens; small members and shards unless `options` say otherwise."""
    options = {"bytes_per_member": 4 * seq_len * 2, "bytes_per_shard": 4096, "validation_fraction": 0.0} | options
    random = np.random.default_rng(seed)
    left = num_sequences * seq_len + 1
    documents = []
    while left:
        num_tokens = min(left, int(random.integers(1, 60)))
        documents.append((f"{len(documents)}", random.integers(0, TOKENIZER.get_vocab_size(), num_tokens)))
        left -= num_tokens
    prepare_tokens(documents, open_store(url), TOKENIZER, PrepareConfig(seq_len=seq_len, **options))
    return TokenDataset.open(url)


def contents(dataset: TokenDataset) -> dict[tuple[int, int], tuple[bytes, bytes, int]]:
    """{(shard, offset): (tokens, document starts, targets that count)}, read without the stream."""
    sequences = dataset.sequences()
    return {
        (shard, offset): (sequence.tokens.astype(np.int64).tobytes(), sequence.starts.tobytes(), sequence.num_targets)
        for shard, count in enumerate(dataset.sequences_per_shard)
        for offset, sequence in zip(range(count), sequences, strict=False)
    }


def rows(batch: Batch, order: SampleOrder) -> list[tuple[tuple[int, int], tuple[bytes, bytes, int]]]:
    """Each row of a batch in the form of `contents`."""
    found = []
    for row, index in enumerate(batch.sample_indices):
        address = order(index)
        tokens, targets = batch.tokens[row].numpy(), batch.targets[row].numpy()
        num_targets = int((targets != -100).sum())
        # Padding is zeros, so that the last, ignored target is known too.
        last = targets[-1] if num_targets == len(targets) else 0
        starts = np.nonzero(batch.document_starts[row].numpy())[0]
        packed = np.append(tokens, last).tobytes()
        found.append(((address.shard, address.offset), (packed, starts.astype(np.int64).tobytes(), num_targets)))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
