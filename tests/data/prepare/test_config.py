"""The settings of preparing: an impossible value is refused with the field, the value and the remedy."""

from typing import Any

import pytest

from nltrain.data.prepare import PrepareConfig
from nltrain.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("seq_len", 0, "must be at least 1"),
        ("bytes_per_member", 0, "must be at least 1"),
        ("bytes_per_shard", -1, "must be at least 1"),
        ("group_bytes", 0, "must be at least 1"),
        ("max_record_bytes", 0, "must be at least 1"),
        ("validation_fraction", 1.0, "must be in [0, 1)"),
        ("validation_fraction", -0.1, "must be in [0, 1)"),
        ("document_fraction", 0.0, "must be in (0, 1]"),
        ("document_fraction", float("nan"), "must be in (0, 1]"),
        ("max_bad_fraction", 1.1, "must be in [0, 1]"),
    ],
)
def test_an_impossible_value_is_refused(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        PrepareConfig(**{field: value})
    assert str(error.value) == f"prepare.{field}={value}: {remedy}"
