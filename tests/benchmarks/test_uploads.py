"""What decides whether an upload's cost is within its bound: the interval of a median, and a sink that takes all."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.uploads import median_of
from nltrain.store import open_store


@pytest.mark.parametrize("num", [6, 8, 9, 12, 15])
def test_the_interval_is_the_narrowest_that_misses_the_median_in_at_most_one_of_twenty_samples(num: int) -> None:
    _, lower, upper = median_of(range(num, 0, -1))
    cut = round(lower) - 1
    assert round(upper) == num - cut
    # Each value is below the true median or above it, like a coin; all 2 ** num samples are equally likely.
    below = [sum(sides) for sides in itertools.product((0, 1), repeat=num)]
    missed = [sum(count <= left or count >= num - left for count in below) / 2**num for left in (cut, cut + 1)]
    assert missed[0] <= 0.05 < missed[1]


def test_a_single_disturbed_round_moves_neither_the_median_nor_its_interval() -> None:
    quiet = [1.0 + i / 1000 for i in range(12)]
    assert median_of([*quiet[:-1], 7.0]) == median_of(quiet)


def test_too_few_rounds_have_the_range_of_their_values_as_interval() -> None:
    assert median_of([1.0, 3.0, 2.0]) == (2.0, 1.0, 3.0)


def test_the_sink_takes_objects_of_all_sizes_on_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "benchmarks._uploader", "sink"]
    root = Path(__file__).resolve().parents[2]
    sink = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert sink.stdout is not None
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(sink.stdout.readline())}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        store = open_store("s3://sink/x")
        for num_bytes in (1, 5 << 20, 0, (1 << 20) + 3):
            store.put("object", bytes(num_bytes))
        assert getattr(store, "retries", None) == 0
    finally:
        sink.kill()
        sink.wait()
