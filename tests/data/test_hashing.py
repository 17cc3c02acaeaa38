"""Hashes are part of the format: a new value would change the order of samples and the split of documents."""

import numpy as np
import pytest

from nltrain.data.hashing import key64, mix64, unit_hash


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ((), 13020603013274838756),
        (("a",), 9243798235275095992),
        (("a", 1), 8098670429562427586),
        ((0, "hold out", "é"), 12754369181984810302),
        (("latin\udce9",), 7807070298882532032),
    ],
    ids=["nothing", "a name", "a name and a number", "a document", "a file name that is not UTF-8"],
)
def test_a_key_never_changes(parts: tuple[str | int, ...], key: int) -> None:
    assert key64(*parts) == key


def test_parts_that_read_alike_when_joined_have_different_keys() -> None:
    assert len({key64("ab", "c"), key64("a", "bc"), key64("abc"), key64("abc", "")}) == 4


def test_mixing_never_changes_and_differs_by_key() -> None:
    assert mix64(np.arange(3), 0).tolist() == [0, 16294208416658607535, 7960286522194355700]
    assert mix64(np.arange(3), 2**64 - 1).tolist() == [13029008266876403067, 16490336266968443936, 16834447057089888969]
    assert len(np.unique(mix64(np.arange(10_000), 7))) == 10_000


def test_shares_by_hash_are_even() -> None:
    drawn = np.array([unit_hash(0, "keep", f"document {n}") for n in range(10_000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs((drawn < 0.25).mean() - 0.25) < 0.02
