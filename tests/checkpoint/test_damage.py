"""Damage is refused by name, the checkpoint before is taken, nothing is deleted, nothing stored is ever run."""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nltrain.checkpoint import (
    Checkpointer,
    CorruptCheckpointError,
    MismatchError,
)
from nltrain.checkpoint.manifest import key_of, parse_manifest
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tree import sha256_of
from nltrain.fragment import Fragment
from nltrain.store import Store, StoreError
from tests.checkpoint.support import CONFIG, NEW, OLD, FaultyStore, assert_filled, held, settings, wanted


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def edit(store: Store, path: str, change: Callable[[bytes], bytes]) -> None:
    key = key_of("r", NEW, path)
    store.put(key, change(store.get(key)))


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


def resigned(store: Store, path: str, data: bytes) -> None:
    """Plants `data` with a manifest that vouches for it: an attacker who can write to the store."""
    store.put(key_of("r", NEW, path), data)
    manifest = parse_manifest(store.get(key_of("r", NEW)), "r", NEW)
    entry = [path, len(data), hashlib.sha256(data).hexdigest()]
    files = [entry if f.path == path else list(f) for f in manifest.files]
    body = json.loads(manifest.to_bytes())["manifest"] | {"files": files}
    store.put(key_of("r", NEW), json.dumps({"manifest": body, "sha256": sha256_of(body)}).encode())


FIRST = "rank_00000/state-00000.safetensors"
OWN = "rank_00000/own-00000.safetensors"


def another_runs(store: Store) -> None:
    store.put(key_of("r", NEW), store.get(key_of("other", NEW)))


CORRUPTIONS = {
    "missing shard": (lambda s: s.delete(key_of("r", NEW, FIRST)), f"{FIRST} is missing"),
    "missing own tensors": (lambda s: s.delete(key_of("r", NEW, OWN)), f"{OWN} is missing"),
    "truncated shard": (lambda s: edit(s, FIRST, lambda d: d[:-1]), f"{FIRST} has .* bytes instead of"),
    "longer shard": (lambda s: edit(s, FIRST, lambda d: d + b"x"), f"{FIRST} has .* bytes instead of"),
    "empty shard": (lambda s: edit(s, FIRST, lambda d: b""), f"{FIRST} has 0 bytes instead of"),
    "flipped byte": (lambda s: edit(s, FIRST, lambda d: flip(d, len(d) - 5)), f"{FIRST} has sha256"),
    "flipped byte in a header": (lambda s: edit(s, FIRST, lambda d: flip(d, 12)), f"{FIRST} has sha256"),
    "flipped byte in own tensors": (lambda s: edit(s, OWN, lambda d: flip(d, len(d) - 1)), f"{OWN} has sha256"),
    "flipped byte in the layout": (
        lambda s: edit(s, "layout.json", lambda d: flip(d, 40)),
        "layout.json does not match",
    ),
    "flipped byte in the state": (lambda s: edit(s, "state.json", lambda d: flip(d, 30)), "state.json does not match"),
    "manifest of another run": (another_runs, "manifest.json belongs to other/"),
    "manifest of another folder": (lambda s: s.put(key_of("r", NEW), s.get(key_of("r", OLD))), f"belongs to r/{OLD}"),
    "flipped byte in the manifest": (
        lambda s: edit(s, "manifest.json", lambda d: flip(d, len(d) // 2)),
        "manifest.json",
    ),
    "edited manifest": (
        lambda s: edit(s, "manifest.json", lambda d: d.replace(b'"world_size": 1', b'"world_size": 2')),
        "does not match its own sha256",
    ),
    "truncated manifest": (lambda s: edit(s, "manifest.json", lambda d: d[:50]), "manifest.json is no JSON"),
    "empty manifest": (lambda s: edit(s, "manifest.json", lambda d: b""), "manifest.json is no JSON"),
    "no manifest": (lambda s: s.delete(key_of("r", NEW)), "attempt 2 began before attempt 1 had committed it"),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_refused_by_name_and_the_one_before_is_taken(
    run: Store, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, text = CORRUPTIONS[kind]
    damage(run)
    before = {item.key: item.num_bytes for item in run.list("")}
    caplog.set_level(logging.WARNING)
    fragments = wanted("even_slices", 0, 1)
    checkpointer = Checkpointer(run, "r", None, settings(run.url, keep_last=1))
    loaded = checkpointer.resume(fragments, CONFIG)
    assert loaded.tokens == 100
    assert_filled(fragments, salt=100)
    [(name, reason)] = loaded.passed_over
    assert name == NEW
    assert re.search(text, reason), reason
    assert f"checkpoint r/{NEW} passed over: {reason}" in caplog.text
    after = {item.key for item in run.list("")}
    assert before.keys() <= after
    # Retention does not take the damaged one for one of the last, nor delete it.
    checkpointer.save(300, held("replicated", 0, 1), {"config": CONFIG})
    checkpointer.wait()
    assert checkpointer.newest_complete().tokens == 300
    assert all(run.exists(key) for key in before if NEW in key and kind != "no manifest")


def test_sizes_only_finds_what_a_listing_shows(run: Store) -> None:
    edit(run, FIRST, lambda d: flip(d, len(d) - 5))
    quick = Checkpointer(run, "r", None, settings(run.url, verify="sizes"))
    assert quick.resume(wanted("replicated", 0, 1)).tokens == 200
    edit(run, FIRST, lambda d: d[:-5])
    assert quick.resume(wanted("replicated", 0, 1)).tokens == 100


def test_a_store_that_cannot_be_read_is_not_taken_for_damage(run: Store) -> None:
    class Unreachable(FaultyStore):
        def read_into(self, key: str, start: int, buffers: Any) -> None:
            if key.endswith(".safetensors"):
                raise StoreError(f"{self.url}/{key}: connection refused: check the network")
            self._store.read_into(key, start, buffers)

    with pytest.raises(StoreError, match="connection refused"):
        Checkpointer(Unreachable(run), "r", None, settings(run.url)).resume(wanted("replicated", 0, 1))


def test_payloads_planted_by_someone_who_can_sign_are_never_run(run: Store, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    payload = pickle.dumps(Payload(str(trap)))
    size = len(run.get(key_of("r", NEW, FIRST)))
    fragments = wanted("replicated", 0, 1)
    checkpointer = Checkpointer(run, "r", None, settings(run.url))
    # In the metadata (layout, manifest), in a non-tensor entry (state, own state), in a shard.
    for path in ("layout.json", "state.json", "rank_00000/own.json"):
        kept = run.get(key_of("r", NEW, path))
        resigned(run, path, payload)
        with pytest.raises(CorruptCheckpointError, match=f"{path} is no JSON"):
            checkpointer.load(NEW, fragments)
        resigned(run, path, kept)
    nested = json.dumps({"rng": {"torch": payload.hex(), "__reduce__": ["os.system", f"touch {trap}"]}}).encode()
    resigned(run, "state.json", nested)
    assert checkpointer.load(NEW, fragments).state["rng"]["torch"] == payload.hex()
    resigned(run, FIRST, payload + bytes(size - len(payload)))
    checkpointer.load(NEW, fragments)  # bytes like any others: wrong numbers, nothing more
    run.put(key_of("r", NEW), payload)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is no JSON"):
        checkpointer.load(NEW, fragments)
    assert not trap.exists()
    pickle.loads(payload)
    assert trap.exists(), "the payload itself must work for this test to mean anything"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "total": 4, "pieces": [[0, 4, "../../../etc/passwd", 8]]},
        {"dtype": "F32", "total": 4, "pieces": [[0, 4, FIRST, 1 << 60]]},
        {"dtype": "F32", "total": 4, "pieces": [[0, 4, FIRST, -8]]},
        {"dtype": "F32", "total": 1 << 50, "pieces": [[0, 1 << 50, FIRST, 8]]},
        {"dtype": "F32", "total": 4, "pieces": [[0, 2, FIRST, 8]]},
        {"dtype": "F32", "total": 4, "pieces": [[2, 2, FIRST, 8], [0, 2, FIRST, 16]]},
        {"dtype": "object", "total": 4, "pieces": [[0, 4, FIRST, 8]]},
        {"dtype": "F32", "total": 4, "pieces": "x"},
        {"dtype": "F32", "total": True, "pieces": []},
        7,
    ],
)
def test_a_layout_that_points_anywhere_else_is_refused(run: Store, entry: object) -> None:
    resigned(run, "layout.json", json.dumps({"tensors": {"flags": entry}, "weights": {}}).encode())
    with pytest.raises(CorruptCheckpointError, match=r"layout\.json: tensor flags"):
        _ = StoredCheckpoint(run, "r", NEW).layout


def test_a_model_that_does_not_fit_gets_an_error_that_names_the_entries(run: Store) -> None:
    fragments = wanted("replicated", 0, 1)
    fragments["embed.master"] = Fragment(torch.zeros(10), 0, 10)
    fragments["count"] = Fragment(torch.zeros(1), 0, 1)
    fragments["new.w"] = Fragment(torch.zeros(3), 0, 3)
    with pytest.raises(MismatchError) as caught:
        Checkpointer(run, "r", None, settings(run.url)).load(NEW, fragments)
    for text in ("embed.master has 5003 elements, wanted 10", "count is stored as torch.int64", "new.w is missing"):
        assert text in str(caught.value)
