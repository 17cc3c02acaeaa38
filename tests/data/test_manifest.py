"""The manifest: complete or refused, and a fingerprint that changes with the content."""

import json
from pathlib import Path
from typing import Any

import pytest

from nltrain.data import DataError, Manifest
from nltrain.data.manifest import read_manifest
from nltrain.store import open_store
from tests.data.support import make_dataset


def test_a_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    manifest = make_dataset(str(tmp_path), 60).manifest
    assert Manifest.parse(manifest.to_bytes(), "u") == manifest == read_manifest(open_store(str(tmp_path)))
    assert manifest.to_bytes() == (tmp_path / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (None, b"", "not a dataset manifest, or a truncated or altered one"),
        (b'"seq_len": 16', b'"seq_len": 17', "altered one .*checksum does not match"),
        (b'"sha256"', b'"sha255"', "not a dataset manifest"),
        (b"{", b"[{", "not a dataset manifest"),
    ],
    ids=["truncated", "altered", "a field is missing", "not JSON"],
)
def test_a_damaged_manifest_is_refused_with_its_url(tmp_path: Path, old: bytes | None, new: bytes, says: str) -> None:
    make_dataset(str(tmp_path), 60)
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    path.write_bytes(data[:-20] if old is None else data.replace(old, new, 1))
    with pytest.raises(DataError, match=rf"{path}: .*{says}"):
        read_manifest(open_store(str(tmp_path)))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(str(tmp_path), 60).manifest
    monkeypatch.setattr("nltrain.data.manifest.FORMAT", "another")
    data = manifest.to_bytes()
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"u: format 'another', this version reads 'nltrain-tokens-1'"):
        Manifest.parse(data, "u")


@pytest.mark.parametrize(
    ("options", "equal"),
    [
        ({"num_sequences": 60}, True),
        ({"num_sequences": 60, "seed": 1}, False),
        ({"num_sequences": 120, "seq_len": 8}, False),
        ({"num_sequences": 61}, False),
    ],
    ids=["the same", "other tokens", "another length", "one more"],
)
def test_the_fingerprint_changes_with_the_content_alone(tmp_path: Path, options: dict[str, Any], equal: bool) -> None:
    first = make_dataset(str(tmp_path / "a"), 60)
    assert (make_dataset(str(tmp_path / "b"), **options).fingerprint == first.fingerprint) == equal
    stored = json.loads((tmp_path / "a" / "manifest.json").read_bytes())
    assert stored["splits"]["train"]["fingerprint"] == first.fingerprint
