"""Packed documents do not leak into each other: a model's memory begins anew where the stream says one starts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nltrain.data import DataConfig, TokenStream, open_order
from nltrain.data.prepare import PrepareConfig, prepare_tokens
from nltrain.model import build, preset
from nltrain.store import open_store
from tests.data.support import TOKENIZER


@pytest.mark.parametrize("family", ["hope", "hope_attention", "titans", "transformer"])
def test_a_packed_document_is_read_as_if_it_stood_alone(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    model = build(preset(family, "tiny")).eval()
    random = np.random.default_rng(0)
    lengths = (70, 33, 45, 109)
    documents = [(str(n), random.integers(0, TOKENIZER.get_vocab_size(), length)) for n, length in enumerate(lengths)]
    config = PrepareConfig(seq_len=256, validation_fraction=0.0)
    prepare_tokens(documents, open_store(str(tmp_path / "set")), TOKENIZER, config)
    data = DataConfig(prefix=str(tmp_path / "set"), seq_len=256, cache_dir=str(tmp_path / "cache"))
    with TokenStream(data, open_order(data), [[0]]) as stream:
        batch = next(stream)
    starts = batch.document_starts[0].nonzero()[:, 0].tolist()
    assert starts == [0, 70, 103, 148] and batch.num_targets == 256
    with torch.no_grad():
        packed, _ = model(batch.tokens, batch.document_starts)
        unmarked, _ = model(batch.tokens, torch.zeros_like(batch.document_starts))
        for start, length in zip(starts, lengths, strict=True):
            end = min(start + length, 256)
            alone, _ = model(batch.tokens[:, start:end], batch.document_starts[:, start:end])
            torch.testing.assert_close(packed[:, start:end], alone, atol=2e-4, rtol=2e-4)
    # Without the marks the later documents do read the earlier ones.
    assert (unmarked[:, 148:256] - packed[:, 148:256]).abs().max() > 1e-2
