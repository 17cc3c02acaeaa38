"""A batch: targets are the next tokens, padding counts nowhere, and a rank without a sequence gets one of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nltrain.data import IGNORED_TARGET, Batch
from nltrain.data.shards import Sequence
from nltrain.model import arrange, preset


def test_targets_are_the_next_tokens_and_padding_is_ignored() -> None:
    whole = Sequence(np.arange(10, 15, dtype=np.uint16), np.array([0, 3]), 4)
    short = Sequence(np.array([7, 8, 9, 0, 0], np.uint16), np.array([], np.int64), 2)
    batch = Batch.pack([whole, short], np.array([30, 2]), 4)
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [7, 8, 9, 0]]
    assert batch.targets.tolist() == [[11, 12, 13, 14], [8, 9, IGNORED_TARGET, IGNORED_TARGET]]
    assert batch.document_starts.tolist() == [[True, False, False, True], [False] * 4]
    assert batch.sample_indices == (30, 2) and batch.num_targets == 6
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert batch.num_bytes == sum(t.nbytes for t in (batch.tokens, batch.targets, batch.document_starts))


@pytest.mark.parametrize(("seq_len", "vocab_size", "num_documents"), [(16, 300, 1), (4096, 1000, 8)])
def test_padding_is_varied_text_without_targets_and_always_the_same(
    seq_len: int, vocab_size: int, num_documents: int
) -> None:
    batch, again = Batch.padding(seq_len, vocab_size), Batch.padding(seq_len, vocab_size)
    assert batch.tokens.shape == (1, seq_len) and torch.equal(batch.tokens, again.tokens)
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < vocab_size
    assert batch.num_targets == 0 and batch.sample_indices == () and (batch.targets == IGNORED_TARGET).all()
    assert batch.document_starts.sum() == num_documents and batch.document_starts[0, 0]
    assert (batch.tokens[:, 1:] != batch.tokens[:, :-1]).float().mean() > 0.98


def test_a_batch_on_another_device_holds_the_same() -> None:
    batch = Batch.padding(8, 50).to("meta")
    assert batch.tokens.device.type == batch.targets.device.type == batch.document_starts.device.type == "meta"
    assert batch.sample_indices == () and batch.num_bytes == 8 * 17


def test_a_layout_travels_with_its_batch_and_is_counted() -> None:
    config = preset("hope", "tiny")
    batch = Batch.padding(1024, 50)
    whole = replace(batch, arrangement=arrange(config, batch.document_starts))
    assert whole.documents is whole.arrangement and batch.documents is batch.document_starts
    arrangement = whole.arrangement
    assert arrangement is not None and whole.num_bytes - batch.num_bytes == arrangement.num_bytes >= 1024 * 8
    moved = whole.to("meta").documents
    assert moved.positions.device.type == moved.starts.device.type == "meta"
    assert moved.blocking(config.rule).position.device.type == "meta" and moved.num_bytes == arrangement.num_bytes
