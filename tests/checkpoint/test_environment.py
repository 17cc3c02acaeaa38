"""What is recorded of the software that wrote a checkpoint."""

import platform
import re
from pathlib import Path

import torch

from nltrain.checkpoint.environment import _git_commit, environment


def test_versions_and_the_commit_are_named() -> None:
    found = environment()
    assert found["python"] == platform.python_version() and torch.__version__.startswith(
        found["torch"].partition("+")[0]
    )
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40,64}(\+dirty)?", found["git_commit"])


def test_outside_a_work_tree_there_is_no_commit(tmp_path: Path) -> None:
    assert _git_commit(tmp_path) is None
