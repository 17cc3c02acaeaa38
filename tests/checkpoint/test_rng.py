"""Random generators go on where they were when the checkpoint was saved."""

import random

import numpy as np
import torch

from nltrain.checkpoint import Checkpointer, capture_rng, restore_rng
from nltrain.checkpoint.manifest import checkpoint_name
from nltrain.store import Store
from tests.checkpoint.support import held, settings, wanted


def test_random_generators_go_on_where_they_were(run: Store) -> None:
    saved = capture_rng()
    checkpointer = Checkpointer(run, "rng", None, settings(run.url))
    checkpointer.save(1, held("replicated", 0, 1), {}, {"rng": saved})
    drawn = random.random(), np.random.rand(), torch.rand(3)
    random.gauss(0, 1)
    checkpointer.wait()
    restore_rng(checkpointer.load(checkpoint_name(1, 1), wanted("replicated", 0, 1)).rank_state["rng"])
    assert (random.random(), np.random.rand()) == drawn[:2] and torch.equal(torch.rand(3), drawn[2])
