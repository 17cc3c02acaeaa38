"""Reference entropies of a prepared dataset: pairs of tokens tell more about a text than single ones."""

from pathlib import Path

import numpy as np

from nltrain.data import TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare
from nltrain.evaluate.entropy import bigram_entropy, reference_entropies, unigram_entropy
from nltrain.store import open_store
from tests.data.support import TOKENIZER


def test_entropies_are_those_of_the_token_streams(tmp_path: Path) -> None:
    documents = [(f"name {n}", f"document {n}\n" + "some words in a row, " * (n % 17)) for n in range(90)]
    prepare(documents, open_store(str(tmp_path)), TOKENIZER, PrepareConfig(seq_len=32, validation_fraction=0.1))
    train, validation = TokenDataset.open(str(tmp_path)), TokenDataset.open(str(tmp_path), "validation")
    found = reference_entropies(train, validation)
    assert 0 < found.bigram_nats < found.unigram_nats < np.log(TOKENIZER.get_vocab_size())
    streams = list(train.tokens_by_group()), list(validation.tokens_by_group())
    assert found.unigram_nats == unigram_entropy(*streams, train.vocab_size)
    assert found.bigram_nats == bigram_entropy(*streams, train.vocab_size)


def test_counted_by_hand() -> None:
    train, validation = [np.array([0, 1, 2, 1, 2])], [np.array([1, 2, 0, 3])]
    # Add-one: counts 2, 3, 3, 1 of 9. Pairs 01 12 21 12: c(1)=2, d(1)=1; c(2)=1, d(2)=1; c(0)=1, d(0)=1.
    p = np.array([2, 3, 3, 1]) / 9
    assert np.isclose(unigram_entropy(train, validation, 4), -np.log(p[[2, 0, 3]]).mean(), rtol=1e-6)
    expected = [(2 + p[2]) / 3, (0 + p[0]) / 2, (0 + p[3]) / 2]
    assert np.isclose(bigram_entropy(train, validation, 4), -np.log(expected).mean(), rtol=1e-6)
    # A token never seen before falls back to the unigram.
    assert np.isclose(bigram_entropy(train, [np.array([3, 1])], 4), -np.log(p[1]), rtol=1e-6)
