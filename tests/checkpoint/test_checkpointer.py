"""When a run saves, and from which checkpoint it goes on."""

import pytest

from nltrain.checkpoint import Checkpointer, ConfigChangedError, CorruptCheckpointError, MismatchError
from nltrain.checkpoint.manifest import key_of
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.checkpoint.tree import sha256_of
from nltrain.store import Store
from tests.checkpoint.support import CONFIG, NEW, OLD, assert_filled, settings, wanted


def test_the_clock_of_saves_is_the_token_count(run: Store) -> None:
    checkpointer = Checkpointer(run, "clock", None, settings(run.url, every_tokens=100))
    assert [checkpointer.due(t, t + 30) for t in range(0, 300, 30)] == [
        t // 100 < (t + 30) // 100 for t in range(0, 300, 30)
    ]
    minutes = Checkpointer(run, "clock", None, settings(run.url, every_minutes=1e-9))
    assert minutes.due(0, 1)
    assert not minutes.due(0, 1, at_fold=False)
    assert not Checkpointer(run, "clock", None, settings(run.url)).due(0, 1 << 40)


def test_a_changed_config_is_refused_and_an_allowed_change_enters_the_lineage(
    run: Store, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_a_checkpoint_picked_by_hand_is_taken_once_then_the_run_goes_on_from_its_own(run: Store) -> None:
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


def test_no_sound_checkpoint_is_an_error_and_none_at_all_a_fresh_start(run: Store) -> None:
    for name in (OLD, NEW):
        run.delete(key_of("r", name, "rank_00000/state-00000.safetensors"))
    with pytest.raises(CorruptCheckpointError, match="none of 2 folders is a sound checkpoint"):
        Checkpointer(run, "r", None, settings(run.url)).resume(wanted("replicated", 0, 1))
    assert Checkpointer(run, "r", None, settings(run.url, resume="never")).resume({}) is None
    assert Checkpointer(run, "new", None, settings(run.url)).resume(wanted("replicated", 0, 1)) is None
