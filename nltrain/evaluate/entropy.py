"""Reference losses of a dataset: what counting alone achieves, in nats per token.

A model that has learned anything is below the unigram figure; one that uses more than the previous token can be below
the bigram figure. Both are pure functions of the token streams.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nltrain.data.dataset import TokenDataset


class ReferenceEntropies(NamedTuple):
    """Cross-entropies on the validation targets, in nats per token."""

    unigram_nats: float
    bigram_nats: float


def unigram_entropy(train: Iterable[np.ndarray], validation: Iterable[np.ndarray], vocab_size: int) -> float:
    """Cross-entropy [nats per token] of p(b) = (c(b) + 1) / (N + V), with c and N counted over the training tokens.

    Averaged over the validation targets, that is every token of a stream but its first.
    """
    log_p = np.log(_add_one(train, vocab_size))
    targets = np.concatenate([stream[1:] for stream in validation])
    return float(-log_p[targets].mean())


def bigram_entropy(train: Iterable[np.ndarray], validation: Iterable[np.ndarray], vocab_size: int) -> float:
    """Cross-entropy [nats per token] of bigram counts with Witten-Bell interpolation to the add-one unigram.

    p(b | a) = (c(a, b) + d(a) * p(b)) / (c(a) + d(a)), where c(a, b) and c(a) count the pairs of the training streams,
    d(a) is the number of different tokens seen after a, and p(b) is the unigram of `unigram_entropy`. For an `a` never
    seen (c(a) = d(a) = 0) it is p(b). Averaged over the validation targets, as `unigram_entropy`.
    """
    train = list(train)
    p_unigram = _add_one(train, vocab_size)
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    firsts = pairs // vocab_size
    num_after = np.bincount(firsts, weights=counts, minlength=vocab_size)
    num_kinds_after = np.bincount(firsts, minlength=vocab_size)

    asked = _pairs(validation, vocab_size)
    a, b = asked // vocab_size, asked % vocab_size
    place = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    count = np.where(pairs[place] == asked, counts[place], 0)
    total = num_after[a] + num_kinds_after[a]
    seen = total > 0
    p = np.where(seen, (count + num_kinds_after[a] * p_unigram[b]) / np.where(seen, total, 1), p_unigram[b])
    return float(-np.log(p).mean())


def reference_entropies(train: TokenDataset, validation: TokenDataset) -> ReferenceEntropies:
    """Both entropies of a prepared dataset; reads each split once. Raises DataError or StoreError."""
    train_streams, validation_streams = list(train.tokens_by_group()), list(validation.tokens_by_group())
    return ReferenceEntropies(
        unigram_entropy(train_streams, validation_streams, train.vocab_size),
        bigram_entropy(train_streams, validation_streams, train.vocab_size),
    )


def _add_one(streams: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """[V] probabilities of add-one counts."""
    counts = np.ones(vocab_size)
    for stream in streams:
        counts += np.bincount(stream, minlength=vocab_size)
    return counts / counts.sum()


def _pairs(streams: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Each pair of neighbours (a, b) as a * vocab_size + b; [num_pairs] int64."""
    return np.concatenate([stream[:-1].astype(np.int64) * vocab_size + stream[1:] for stream in streams])
