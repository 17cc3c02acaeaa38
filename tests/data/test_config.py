"""The `data` section: an impossible value is refused with the field, the value and the remedy."""

from typing import Any

import pytest

from nltrain.data import DataConfig
from nltrain.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"seq_len": 0}, "data.seq_len=0: must be at least 1"),
        ({"window_shards": 0}, "data.window_shards=0: must be at least 1"),
        ({"cache_bytes": -1}, "data.cache_bytes=-1: must be at least 1"),
        ({"buffer_bytes": 0}, "data.buffer_bytes=0: must be at least 1"),
        ({"prefetch_batches": 0}, "data.prefetch_batches=0: must be at least 1"),
        ({"download_threads": 0}, "data.download_threads=0: must be positive"),
        ({"attempts": 0}, "data.attempts=0: must be positive"),
        ({"timeout_s": 0.0}, "data.timeout_s=0.0: must be positive"),
        ({"range_read_batches": -1}, "data.range_read_batches=-1: must be at least 0"),
        (
            {"prefix": "a", "weights": (1.0, 2.0)},
            "data.weights=(1.0, 2.0): 2 weights for 1 prefixes: give one each, or none",
        ),
        (
            {"prefix": "a", "weights": (-1.0,)},
            "data.weights=(-1.0,): each must be positive; leave a prefix out instead of 0",
        ),
        (
            {"prefix": "a", "weights": (float("nan"),)},
            "data.weights=(nan,): each must be positive; leave a prefix out instead of 0",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_impossible_value_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(**wrong)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("prefix", "prefixes"),
    [("", ()), ("s3://b/x", ("s3://b/x",)), ("s3://b/x, /y,", ("s3://b/x", "/y"))],
    ids=["none", "one", "two"],
)
def test_prefixes_are_separated_by_commas(prefix: str, prefixes: tuple[str, ...]) -> None:
    assert DataConfig(prefix=prefix).prefixes == prefixes


def test_the_cache_folder_is_one_per_user_unless_named() -> None:
    assert DataConfig(cache_dir="/somewhere").cache_folder == "/somewhere"
    assert DataConfig().cache_folder == DataConfig(prefix="s3://other").cache_folder != ""
