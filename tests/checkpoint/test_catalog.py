"""Attempts are fenced, listings tell the truth, retention lets go of nothing that is needed."""

import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nltrain.checkpoint.catalog import (
    CheckpointInfo,
    apply_retention,
    attempts,
    claim_attempt,
    commit,
    list_checkpoints,
    to_delete,
)
from nltrain.checkpoint.errors import CheckpointError, StaleAttemptError
from nltrain.checkpoint.manifest import FileEntry, Manifest, checkpoint_name, key_of
from nltrain.store import Store, open_store


def info(tokens: int, attempt: int = 1, complete: bool = True) -> CheckpointInfo:
    return CheckpointInfo(checkpoint_name(tokens, attempt), tokens, attempt, complete, 1, 0.0, "", False, False, 2)


def write(store: Store, tokens: int, attempt: int, run: str = "r", committed: bool = True) -> str:
    """A folder with one small file, committed or not."""
    name = checkpoint_name(tokens, attempt)
    store.put(key_of(run, name, "state.json"), b"{}")
    files = (FileEntry("state.json", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),)
    if committed:
        commit(store, Manifest(run, name, tokens, attempt, 1, 0.0, "", "", "nonce", files))
    return name


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3), st.booleans()), unique_by=lambda c: c[:2], max_size=20),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_retention_keeps_the_newest_the_milestones_and_everything_incomplete(
    folders: list[tuple[int, int, bool]], keep_last: int, every: int
) -> None:
    found = [info(*folder) for folder in folders]
    going = set(to_delete(found, keep_last, every))
    complete = sorted((c for c in found if c.complete), key=lambda c: c.order)
    assert going.isdisjoint(c.name for c in complete[-keep_last:])
    assert going.isdisjoint(c.name for c in found if not c.complete)
    if every:
        kept = [c for c in complete if c.name not in going]
        assert {c.tokens // every for c in complete} - {0} == {c.tokens // every for c in kept} - {0}
    # What one pass kept, the next one keeps too.
    assert not to_delete([c for c in found if c.name not in going], keep_last, every)
    assert len(complete) - len(going) <= keep_last + (len({c.tokens // every for c in complete}) if every else 0)


def test_retention_does_not_count_what_verification_refused() -> None:
    found = [info(1), info(2), info(3)]
    assert to_delete(found, 1) == [info(1).name, info(2).name]
    assert to_delete(found, 1, refused={info(3).name}) == [info(1).name]


def test_retention_leaves_folders_in_flight_and_other_runs_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_attempt(store, "r")
    for tokens in (1, 2, 3):
        write(store, tokens, 1)
    write(store, 4, 1, committed=False)
    write(store, 1, 1, run="r2")
    store.put("r/checkpoints/notes.txt", b"mine")
    assert apply_retention(store, "r", 1, 1, 0) == [checkpoint_name(1, 1), checkpoint_name(2, 1)]
    assert [c.name for c in list_checkpoints(store, "r")] == [checkpoint_name(3, 1), checkpoint_name(4, 1)]
    assert list_checkpoints(store, "r2")[0].complete
    assert store.exists("r/checkpoints/notes.txt")


def test_a_new_attempt_closes_unfinished_folders_for_ever(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert claim_attempt(store, "r") == 1
    write(store, 1, 1)
    write(store, 2, 1, committed=False)
    assert claim_attempt(store, "r") == 2
    with pytest.raises(StaleAttemptError, match="attempt 2 has begun"):
        write(store, 2, 1)
    # Even a commit that had looked for newer attempts before the second one began comes too late.
    assert not store.put_if_absent(key_of("r", checkpoint_name(2, 1)), b"a manifest")
    assert [c.complete for c in list_checkpoints(store, "r")] == [True, False]
    write(store, 3, 2)
    assert apply_retention(store, "r", 2, 5, 0) == []
    # Its data is cleared away; the closed manifest stays.
    assert [item.key for item in store.list(key_of("r", checkpoint_name(2, 1), ""))] == [
        key_of("r", checkpoint_name(2, 1))
    ]


def test_attempts_claimed_at_the_same_moment_get_different_numbers(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    found: list[int] = []

    def claim() -> None:
        try:
            found.append(claim_attempt(store, "r"))
        except StaleAttemptError:
            found.append(-1)

    threads = [threading.Thread(target=claim) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for number in found if number > 0]
    assert len(numbers) == len(set(numbers)) >= 1
    assert attempts(store, "r") == sorted(numbers)


def test_an_attempt_number_is_used_once_and_only_upwards(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert claim_attempt(store, "r", 5) == 5
    for number in (5, 3):
        with pytest.raises(StaleAttemptError, match=f"attempt {number} of run r cannot begin: attempt 5"):
            claim_attempt(store, "r", number)
    assert claim_attempt(store, "r") == 6


def test_a_later_attempt_is_newer_even_at_fewer_tokens(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_attempt(store, "r")
    write(store, 1000, 1)
    claim_attempt(store, "r")
    write(store, 600, 2)
    assert [c.tokens for c in list_checkpoints(store, "r")] == [1000, 600]


@pytest.mark.parametrize("run", ["", "../x", "/abs", "a//b", "a/../b", ".hidden", "a b"])
def test_a_run_that_is_no_folder_name_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(CheckpointError, match="no name for a folder"):
        list_checkpoints(open_store(str(tmp_path)), run)
