"""Damage is refused by name, the checkpoint before is taken, nothing is deleted, nothing stored is ever run."""

import hashlib
import json
import logging
import os
import pickle
import re
import threading
import time

import pytest
import torch

from nltrain.checkpoint import (
    Checkpointer,
    ConfigChangedError,
    CorruptCheckpointError,
    MismatchError,
    SaveFailedError,
    capture_rng,
    restore_rng,
)
from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.checkpoint.manifest import checkpoint_name, key_of, parse_manifest
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tree import sha256_of
from nltrain.fragment import Fragment
from nltrain.store import StoreError, open_store
from tests.checkpoint.support import FaultyStore, assert_filled, held, settings, wanted

CONFIG = {"seed": 1, "lr": 0.1}
OLD, NEW = checkpoint_name(100, 1), checkpoint_name(200, 1)


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def run(tmp_path):
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


def edit(store, path: str, change) -> None:
    key = key_of("r", NEW, path)
    store.put(key, change(store.get(key)))


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


def resigned(store, path: str, data: bytes) -> None:
    """Plants `data` with a manifest that vouches for it: an attacker who can write to the store."""
    store.put(key_of("r", NEW, path), data)
    manifest = parse_manifest(store.get(key_of("r", NEW)), "r", NEW)
    entry = [path, len(data), hashlib.sha256(data).hexdigest()]
    files = [entry if f.path == path else list(f) for f in manifest.files]
    body = json.loads(manifest.to_bytes())["manifest"] | {"files": files}
    store.put(key_of("r", NEW), json.dumps({"manifest": body, "sha256": sha256_of(body)}).encode())


FIRST = "rank_00000/state-00000.safetensors"
OWN = "rank_00000/own-00000.safetensors"


def another_runs(store) -> None:
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
def test_damage_is_refused_by_name_and_the_one_before_is_taken(run, kind, caplog):
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


def test_sizes_only_finds_what_a_listing_shows(run):
    edit(run, FIRST, lambda d: flip(d, len(d) - 5))
    quick = Checkpointer(run, "r", None, settings(run.url, verify="sizes"))
    assert quick.resume(wanted("replicated", 0, 1)).tokens == 200
    edit(run, FIRST, lambda d: d[:-5])
    assert quick.resume(wanted("replicated", 0, 1)).tokens == 100


def test_no_sound_checkpoint_is_an_error_and_none_at_all_a_fresh_start(run):
    for name in (OLD, NEW):
        run.delete(key_of("r", name, FIRST))
    with pytest.raises(CorruptCheckpointError, match="none of 2 folders is a sound checkpoint"):
        Checkpointer(run, "r", None, settings(run.url)).resume(wanted("replicated", 0, 1))
    assert Checkpointer(run, "r", None, settings(run.url, resume="never")).resume({}) is None
    assert Checkpointer(run, "new", None, settings(run.url)).resume(wanted("replicated", 0, 1)) is None


def test_a_store_that_cannot_be_read_is_not_taken_for_damage(run):
    class Unreachable(FaultyStore):
        def read_into(self, key, start, buffers):
            if key.endswith(".safetensors"):
                raise StoreError(f"{self.url}/{key}: connection refused: check the network")
            self._store.read_into(key, start, buffers)

    with pytest.raises(StoreError, match="connection refused"):
        Checkpointer(Unreachable(run), "r", None, settings(run.url)).resume(wanted("replicated", 0, 1))


def test_payloads_planted_by_someone_who_can_sign_are_never_run(run, tmp_path):
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
def test_a_layout_that_points_anywhere_else_is_refused(run, entry):
    resigned(run, "layout.json", json.dumps({"tensors": {"flags": entry}, "weights": {}}).encode())
    with pytest.raises(CorruptCheckpointError, match=r"layout\.json: tensor flags"):
        _ = StoredCheckpoint(run, "r", NEW).layout


def test_a_model_that_does_not_fit_is_told_which_entries(run):
    fragments = wanted("replicated", 0, 1)
    fragments["embed.master"] = Fragment(torch.zeros(10), 0, 10)
    fragments["count"] = Fragment(torch.zeros(1), 0, 1)
    fragments["new.w"] = Fragment(torch.zeros(3), 0, 3)
    with pytest.raises(MismatchError) as caught:
        Checkpointer(run, "r", None, settings(run.url)).load(NEW, fragments)
    for text in ("embed.master has 5003 elements, wanted 10", "count is stored as torch.int64", "new.w is missing"):
        assert text in str(caught.value)


def test_a_changed_config_is_refused_and_an_allowed_change_enters_the_lineage(run, caplog):
    changed = CONFIG | {"lr": 0.2}
    fragments = wanted("replicated", 0, 1)
    with pytest.raises(ConfigChangedError, match=r"lr: stored 0\.1, now 0\.2"):
        Checkpointer(run, "r", None, settings(run.url)).resume(fragments, changed)
    checkpointer = Checkpointer(run, "r", None, settings(run.url, may_change=("lr",)))
    loaded = checkpointer.resume(fragments, changed)
    assert loaded.tokens == 200 and [c.field for c in loaded.changes] == ["lr"]
    assert "resuming with another lr: stored 0.1, now 0.2" in caplog.text
    checkpointer.save(300, fragments, {"config": changed})
    checkpointer.wait()
    manifest = StoredCheckpoint(run, "r", checkpointer.newest_complete().name).manifest
    [step] = manifest.lineage
    assert step["name"] == NEW and step["changes"] == ["lr: stored 0.1, now 0.2"]
    assert manifest.config_hash == sha256_of(changed) and manifest.environment["torch"]


def test_a_checkpoint_picked_by_hand_is_taken_once_then_the_run_goes_on_from_its_own(run):
    by_hand = f"{run.url}/r@100"
    first = Checkpointer(run, "branch", None, settings(run.url, resume=by_hand))
    fragments = wanted("replicated", 0, 1)
    assert first.resume(fragments, CONFIG).tokens == 100
    assert_filled(fragments, salt=100)
    first.save(150, fragments, {"config": CONFIG})
    first.wait()
    again = Checkpointer(run, "branch", None, settings(run.url, resume=by_hand))
    assert again.resume(fragments, CONFIG).tokens == 150
    elsewhere = Checkpointer(run, "branch", None, settings(run.url, resume=f"{run.url}/r"))
    assert elsewhere.resume(fragments, CONFIG).tokens == 200
    with pytest.raises(MismatchError, match="no such checkpoint"):
        Checkpointer(run, "branch", None, settings(run.url, resume=f"{run.url}/r@7")).resume(fragments)


def test_random_generators_go_on_where_they_were(run):
    import random

    import numpy as np

    saved = capture_rng()
    checkpointer = Checkpointer(run, "rng", None, settings(run.url))
    checkpointer.save(1, held("replicated", 0, 1), {}, {"rng": saved})
    drawn = random.random(), np.random.rand(), torch.rand(3)
    random.gauss(0, 1)
    checkpointer.wait()
    restore_rng(checkpointer.load(checkpoint_name(1, 1), wanted("replicated", 0, 1)).rank_state["rng"])
    assert (random.random(), np.random.rand()) == drawn[:2] and torch.equal(torch.rand(3), drawn[2])


def test_training_waits_for_the_copy_only_and_at_most_one_save_is_in_flight(run):
    store = FaultyStore(run)
    store.waiting = "/state-"
    checkpointer = Checkpointer(store, "async", None, settings(run.url))
    fragments = held("replicated", 0, 1, salt=3)
    assert checkpointer.save(1, fragments, {})
    assert store.reached.wait(10)
    fragments["embed.master"].tensor.zero_()
    timer = threading.Timer(0.5, store.may_go_on.set)
    began = time.monotonic()
    timer.start()
    assert checkpointer.save(2, fragments, {})
    assert time.monotonic() - began >= 0.4
    checkpointer.wait()
    first, second = checkpointer.poll()
    assert first.stall_seconds < 0.2 and second.stall_seconds >= 0.4 and not first.error
    back = wanted("replicated", 0, 1)
    checkpointer.load(first.name, back)
    assert_filled(back, salt=3)


def test_a_save_that_hangs_ends_in_an_error_that_names_the_limit(run):
    store = FaultyStore(run)
    store.waiting = "/state-"
    checkpointer = Checkpointer(store, "hang", None, settings(run.url, timeout_s=0.3))
    checkpointer.save(1, held("replicated", 0, 1), {})
    with pytest.raises(SaveFailedError, match=r"save-1 has not ended after checkpoint.timeout_s=0.3 s"):
        checkpointer.wait()
    store.may_go_on.set()


@pytest.mark.parametrize("how", ["failing", "failing_once"])
def test_a_save_that_fails_leaves_no_files_and_the_next_one_stands(run, how):
    """While a rank's files are written, and when the manifest is created."""
    store = FaultyStore(run)
    checkpointer = Checkpointer(store, how, None, settings(run.url, asynchronous=False))
    setattr(store, how, "/state-" if how == "failing" else "/manifest.json")
    checkpointer.save(1, held("replicated", 0, 1), {})
    [failed] = checkpointer.poll()
    assert "refused by the test" in failed.error
    left = [item.key for item in run.list(f"{how}/checkpoints/") if not item.key.endswith("/manifest.json")]
    assert left == []
    store.failing = ""
    checkpointer.save(2, held("replicated", 0, 1), {})
    assert [info.name for info in list_checkpoints(run, how) if info.complete] == [checkpoint_name(2, 1)]


def test_the_clock_of_saves_is_the_token_count(run):
    checkpointer = Checkpointer(run, "clock", None, settings(run.url, every_tokens=100))
    assert [checkpointer.due(t, t + 30) for t in range(0, 300, 30)] == [
        t // 100 < (t + 30) // 100 for t in range(0, 300, 30)
    ]
    minutes = Checkpointer(run, "clock", None, settings(run.url, every_minutes=1e-9))
    assert minutes.due(0, 1)
    assert not minutes.due(0, 1, at_fold=False)
    assert not Checkpointer(run, "clock", None, settings(run.url)).due(0, 1 << 40)
