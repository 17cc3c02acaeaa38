"""What changes the training is refused on resume, by field, unless it is allowed."""

import pytest

from nltrain.checkpoint import CheckpointConfig, ConfigChangedError, check_config, differences

STORED = {"seed": 1, "levels": [{"name": "base", "lr": 1e-3}, {"name": "slow", "lr": 1e-4}], "data": {"workers": 4}}


def test_equal_configs_do_not_differ_and_tuples_equal_lists():
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert check_config(STORED, STORED) == []


def test_every_difference_is_named_with_both_values():
    present = {"seed": 2, "levels": [{"name": "base", "lr": 1e-3}, {"name": "slow", "lr": 2e-4}], "extra": True}
    with pytest.raises(ConfigChangedError) as caught:
        check_config(STORED, present)
    for text in ("seed: stored 1, now 2", "levels.slow.lr: stored 0.0001, now 0.0002", "data.workers", "extra"):
        assert text in str(caught.value)


@pytest.mark.parametrize("pattern", ["data.workers", "data", "data.*", "*.workers"])
def test_an_allowed_change_is_returned(pattern):
    present = STORED | {"data": {"workers": 8}}
    assert [d.field for d in check_config(STORED, present, (pattern,))] == ["data.workers"]


def test_a_field_newer_than_the_checkpoint_is_no_change_where_it_may_change():
    present = STORED | {"model": {"kernel": "auto"}}
    assert check_config(STORED, present, ("model.kernel",)) == []
    with pytest.raises(ConfigChangedError, match=r"model\.kernel"):
        check_config(STORED, present)


def test_an_emptied_list_is_a_difference():
    assert [d.field for d in differences({"a": [1]}, {"a": []})] == ["a"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", ""),
        ("keep_last", 0),
        ("every_tokens", -1),
        ("verify", "maybe"),
        ("when_busy", "panic"),
        ("max_file_bytes", 10),
        ("timeout_s", 0),
        ("resume", ""),
        ("num_threads", 0),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"checkpoint.{field}="):
        CheckpointConfig(**({"url": "folder"} | {field: value}))
