"""Names of folders, and a manifest that vouches for itself."""

import json

import pytest

from nltrain.checkpoint.errors import CheckpointError, CorruptCheckpointError
from nltrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    check_run,
    checkpoint_name,
    key_of,
    parse_layout,
    parse_manifest,
    parse_name,
    tombstone,
)

NAME = checkpoint_name(1000, 3)
FILES = (FileEntry("rank_00000/state-00000.safetensors", 100, "a" * 64),)
MANIFEST = Manifest("r", NAME, 1000, 3, 1, 0.0, "", "", "nonce", FILES)


def test_a_name_says_tokens_and_attempt() -> None:
    assert parse_name(NAME) == (1000, 3) and parse_name("tokens_1-attempt_1") is None
    assert key_of("a/b", NAME) == f"a/b/checkpoints/{NAME}/manifest.json"
    assert check_run("a/b-1.2") == "a/b-1.2"
    with pytest.raises(CheckpointError, match=r"run='a b' is no name for a folder"):
        check_run("a b")


def test_a_manifest_survives_json_and_a_tombstone_gives_its_reason() -> None:
    assert parse_manifest(MANIFEST.to_bytes(), "r", NAME) == MANIFEST and MANIFEST.num_bytes == 100
    assert parse_manifest(tombstone("r", NAME, 4, "too late"), "r", NAME) == "too late"


@pytest.mark.parametrize(
    ("run", "name", "change", "says"),
    [
        ("other", NAME, {}, "belongs to r/"),
        ("r", checkpoint_name(1, 1), {}, "belongs to r/"),
        ("r", NAME, {"tokens": 5}, "does not match its own sha256"),
    ],
)
def test_a_manifest_of_something_else_is_refused(run: str, name: str, change: dict[str, int], says: str) -> None:
    whole = json.loads(MANIFEST.to_bytes())
    whole["manifest"] |= change
    with pytest.raises(CorruptCheckpointError, match=says):
        parse_manifest(json.dumps(whole).encode(), run, name)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([[0, 4, FILES[0].path, 8]], "has 4 of 10 elements"),
        ([[0, 10, FILES[0].path, 96]], "outside its files or order"),
        ([[0, 10, "other.safetensors", 8]], "outside its files or order"),
        ([[0, 10, FILES[0].path, 4]], "has the piece"),
    ],
)
def test_a_layout_that_leaves_a_file_or_an_element_out_is_refused(pieces: list[list[object]], says: str) -> None:
    files = {entry.path: entry for entry in FILES}
    good = {"w": {"dtype": "F32", "total": 10, "pieces": [[0, 10, FILES[0].path, 8]]}}
    assert parse_layout(good, files, "layout.json")["w"].total == 10
    with pytest.raises(CorruptCheckpointError, match=f"layout.json: tensor w .*{says}"):
        parse_layout({"w": {"dtype": "F32", "total": 10, "pieces": pieces}}, files, "layout.json")
