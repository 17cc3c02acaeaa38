"""Settings of checkpoints that cannot be honoured are refused by name."""

import pytest

from nltrain.checkpoint import CheckpointConfig
from nltrain.errors import ConfigError


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
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field}="):
        CheckpointConfig(**({"url": "folder"} | {field: value}))
