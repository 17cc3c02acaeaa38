"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest
import torch

from nltrain.checkpoint import Checkpointer, capture_rng
from nltrain.store import Store, open_store
from tests.checkpoint.support import CONFIG, held, settings


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """Two checkpoints of run `r`, at 100 and 200 tokens, and one of run `other`."""
    store = open_store(str(tmp_path))
    for name, counts in (("r", (100, 200)), ("other", (200,))):
        checkpointer = Checkpointer(store, name, None, settings(store.url))
        for tokens in counts:
            own = {"rng": capture_rng(), "window": torch.full((100,), float(tokens))}
            state = {"config": CONFIG, "T": tokens, "dataset_fingerprint": "d", "note": "aaaa"}
            checkpointer.save(tokens, held("replicated", 0, 1, salt=tokens), state, own)
            checkpointer.wait()
    return store
