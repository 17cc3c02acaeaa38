"""Checkpoints: sharded, committed or absent, loadable at any world size, free of pickles. See docs/checkpoints.md.

checkpointer.py  save, wait, resume, load: what the loop calls      plan.py      who writes which elements
catalog.py       listing, attempts, commit, retention               files.py     files staged in host memory
stored.py        one checkpoint, read by one process                transfer.py  to and from the store, hashed
load.py          loading on all ranks together                      manifest.py  names and the manifest
compare.py       what differs between two configs                   ranks.py     collectives of our own, as JSON
tree.py, rng.py, environment.py   a rank's own state; its random generators; versions
"""

from nltrain.checkpoint.checkpointer import Checkpointer, SaveResult
from nltrain.checkpoint.compare import check_config, differences
from nltrain.checkpoint.config import CheckpointConfig
from nltrain.checkpoint.errors import (
    CheckpointError,
    ConfigChangedError,
    CorruptCheckpointError,
    MismatchError,
    SaveFailedError,
    StaleAttemptError,
)
from nltrain.checkpoint.load import Loaded
from nltrain.checkpoint.rng import capture_rng, restore_rng

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "ConfigChangedError",
    "CorruptCheckpointError",
    "Loaded",
    "MismatchError",
    "SaveFailedError",
    "SaveResult",
    "StaleAttemptError",
    "capture_rng",
    "check_config",
    "differences",
    "restore_rng",
]
