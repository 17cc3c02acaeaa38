"""Checkpoints: sharded, committed or absent, loadable at any world size, free of pickles. See docs/checkpoints.md.

checkpointer.py   save, wait, resume, load: what the loop calls     shares.py     who writes which elements
writer.py         what the thread of a save does                    files.py      files staged in host memory
catalog.py        listing, attempts, commit, retention              transfer.py   to and from the store, hashed
fence.py          looks for a newer attempt while training          manifest.py   names and the manifest
stored.py         one checkpoint, read by one process               load.py       loading on all ranks together
compare.py        what differs between two configs                  tools.py      the commands list, verify, export
exported.py       the model of an export                            errors.py     one type per remedy
tree.py, rng.py, environment.py   a rank's own state; its random generators; versions
"""

from nltrain.checkpoint.checkpointer import Checkpointer
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
from nltrain.checkpoint.writer import SaveResult

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
