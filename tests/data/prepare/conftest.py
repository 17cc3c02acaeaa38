"""An empty corpus for the tests of preparing."""

from pathlib import Path

import pytest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """An empty folder, `corpus`, in an empty folder."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder
