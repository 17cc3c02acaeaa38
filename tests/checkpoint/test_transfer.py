"""Files go to the store and back: what is wanted of them arrives where it belongs, and a changed byte is noticed."""

from pathlib import Path

import pytest
import torch

from nltrain.checkpoint.errors import CorruptCheckpointError
from nltrain.checkpoint.manifest import StoredPiece, StoredTensor
from nltrain.checkpoint.transfer import Hashed, read_files, targets_of, write_files
from nltrain.store import StoreError, open_store
from tests.checkpoint.support import FaultyStore


@pytest.mark.parametrize("hashed", [True, False])
def test_a_slice_over_two_files_arrives_and_damage_is_noticed_where_all_is_read(tmp_path: Path, hashed: bool) -> None:
    store, whole = open_store(str(tmp_path)), torch.arange(20, dtype=torch.float32)
    head = b"12345678"  # where a header would be
    parts = {"a": head + whole[:12].numpy().tobytes(), "b": head + whole[12:].numpy().tobytes()}
    entries = write_files(Hashed(store), [(name, name, lambda data=data: data) for name, data in parts.items()], 2)
    assert [entry.num_bytes for entry in entries] == [56, 40]
    stored = {"w": StoredTensor("F32", 20, (StoredPiece(0, 12, "a", 8), StoredPiece(12, 8, "b", 8)))}
    slice_ = torch.full((9,), float("nan"))
    targets = targets_of(stored, {"w": (slice_, 5)})
    read_files(store, str, entries, targets, hashed, 2)
    assert torch.equal(slice_, whole[5:14])
    store.put("b", parts["b"][:-1] + b"x")  # an element that nobody wants
    if hashed:
        with pytest.raises(CorruptCheckpointError, match=r"b has sha256 .* committed was"):
            read_files(store, str, entries, targets, hashed, 2)
    else:
        read_files(store, str, entries, targets, hashed, 2)


def test_the_first_failure_of_a_write_is_raised(tmp_path: Path) -> None:
    store = FaultyStore(open_store(str(tmp_path)))
    store.failing = "b"
    with pytest.raises(StoreError, match="refused by the test"):
        write_files(Hashed(store), [(name, name, lambda: b"data") for name in "abc"], 1)
