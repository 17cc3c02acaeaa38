"""Every element is written exactly once, in files of bounded size, whatever the ranks hold."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nltrain.checkpoint.errors import ShareError
from nltrain.checkpoint.shares import Piece, assign, table
from nltrain.fragment import Fragment


@st.composite
def tables(draw: st.DrawFn) -> list[list[Piece]]:
    """Ranks whose pieces cover some tensors, with overlaps and copies."""
    size = draw(st.integers(1, 5))
    found = [[] for _ in range(size)]
    for index in range(draw(st.integers(1, 4))):
        total = draw(st.integers(1, 60))
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F64"]))
        cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
        for start, stop in itertools.pairwise(cuts):
            for rank in draw(st.sets(st.integers(0, size - 1), min_size=1)):
                grown = draw(st.integers(0, 3))
                first, last = max(0, start - grown), min(total, stop + grown)
                found[rank].append(Piece(f"t{index}", first, last - first, total, dtype))
    return found


@settings(max_examples=150)
@given(tables())
def test_each_element_is_written_exactly_once_by_a_rank_that_holds_it(held: list[list[Piece]]) -> None:
    written = assign(held)
    covered: dict[str, list[int]] = {}
    for rank, pieces in enumerate(written):
        for name, start, numel, total, _ in pieces:
            counts = covered.setdefault(name, [0] * total)
            for element in range(start, start + numel):
                counts[element] += 1
                assert any(p.name == name and p.start <= element < p.start + p.numel for p in held[rank])
    assert covered.keys() == {piece.name for pieces in held for piece in pieces}
    assert all(count == 1 for counts in covered.values() for count in counts)


def test_copies_are_shared_out_evenly() -> None:
    copies = [Piece(f"t{index:02d}", 0, 1000, 1000, "F32") for index in range(40)]
    written = assign([copies] * 4)
    assert [sum(piece.num_bytes for piece in pieces) for pieces in written] == [40_000] * 4


def test_elements_that_nobody_holds_are_named() -> None:
    with pytest.raises(ShareError, match=r"elements \[4, 6\) of w \(10 in all\) are held by no rank"):
        assign([[Piece("w", 0, 4, 10, "F32")], [Piece("w", 6, 4, 10, "F32")]])


def test_ranks_that_disagree_about_a_tensor_are_refused() -> None:
    with pytest.raises(ShareError, match="w has 11 elements of F32 on rank 1, elsewhere 10 of F32"):
        assign([[Piece("w", 0, 10, 10, "F32")], [Piece("w", 0, 11, 11, "F32")]])


@pytest.mark.parametrize(
    ("fragment", "text"),
    [
        (Fragment(torch.zeros(2, 3), 0, 6), "contiguous 1-D"),
        (Fragment(torch.zeros(6)[::2], 0, 3), "contiguous 1-D"),
        (Fragment(torch.zeros(6), 1, 6), "outside the tensor"),
        (Fragment(torch.zeros(6, dtype=torch.complex64), 0, 6), "no stored form"),
    ],
)
def test_a_fragment_that_is_no_flat_slice_is_refused_by_name(fragment: Fragment, text: str) -> None:
    with pytest.raises(ShareError, match=f"fragment layer.w .*{text}"):
        table({"layer.w": fragment})
