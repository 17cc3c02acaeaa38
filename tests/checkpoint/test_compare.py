"""What changes the training is refused on resume, by field, unless it is allowed."""

import pytest

from nltrain.checkpoint import ConfigChangedError, check_config, differences

STORED = {"seed": 1, "levels": [{"name": "base", "lr": 1e-3}, {"name": "slow", "lr": 1e-4}], "data": {"workers": 4}}


def test_equal_configs_do_not_differ_and_tuples_equal_lists() -> None:
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert check_config(STORED, STORED) == []


def test_every_difference_is_named_with_both_values() -> None:
    present = {"seed": 2, "levels": [{"name": "base", "lr": 1e-3}, {"name": "slow", "lr": 2e-4}], "extra": True}
    with pytest.raises(ConfigChangedError) as caught:
        check_config(STORED, present)
    for text in ("seed: stored 1, now 2", "levels.slow.lr: stored 0.0001, now 0.0002", "data.workers", "extra"):
        assert text in str(caught.value)


@pytest.mark.parametrize("pattern", ["data.workers", "data", "data.*", "*.workers"])
def test_an_allowed_change_is_returned(pattern: str) -> None:
    present = STORED | {"data": {"workers": 8}}
    assert [d.field for d in check_config(STORED, present, (pattern,))] == ["data.workers"]


def test_an_emptied_list_is_a_difference() -> None:
    assert [d.field for d in differences({"a": [1]}, {"a": []})] == ["a"]


@pytest.mark.parametrize(
    ("present", "refused"),
    [
        ({"every": 2, "fold": 2}, ""),  # it follows
        ({"every": 2, "fold": 4}, ""),  # it stays
        ({"every": 2, "fold": 1}, "fold: stored 4, now 1"),  # it has a value of its own
        ({"every": 4, "fold": 2}, "fold: stored 4, now 2"),  # its source has not changed
    ],
)
def test_a_derived_field_may_differ_together_with_its_source_alone(present: dict[str, int], refused: str) -> None:
    stored = {"every": 4, "fold": 4}
    if refused:
        with pytest.raises(ConfigChangedError, match=refused):
            check_config(stored, present, ("every",), {"fold": "every"})
    else:
        check_config(stored, present, ("every",), {"fold": "every"})
    if present != {"every": 4, "fold": 2}:
        with pytest.raises(ConfigChangedError, match="every: stored 4"):
            check_config(stored, present, (), {"fold": "every"})


def test_a_field_newer_than_the_checkpoint_is_no_change_where_it_may_change() -> None:
    present = STORED | {"model": {"kernel": "auto"}}
    assert check_config(STORED, present, ("model.kernel",)) == []
    with pytest.raises(ConfigChangedError, match=r"model\.kernel"):
        check_config(STORED, present)
