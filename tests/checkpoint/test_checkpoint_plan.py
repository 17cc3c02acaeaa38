"""Every element is written exactly once, in files of bounded size, whatever the ranks hold."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load as load_safetensors

from nltrain.checkpoint.errors import CheckpointError, PlanError
from nltrain.checkpoint.files import Staging, layout_of, pack
from nltrain.checkpoint.plan import DTYPES, Piece, assign, itemsize, table
from nltrain.checkpoint.tree import canonical_json, join, split
from nltrain.fragment import Fragment


@st.composite
def tables(draw):
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
def test_each_element_is_written_exactly_once_by_a_rank_that_holds_it(held):
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


def test_copies_are_shared_out_evenly():
    copies = [Piece(f"t{index:02d}", 0, 1000, 1000, "F32") for index in range(40)]
    written = assign([copies] * 4)
    assert [sum(piece.num_bytes for piece in pieces) for pieces in written] == [40_000] * 4


def test_elements_that_nobody_holds_are_named():
    with pytest.raises(PlanError, match=r"elements \[4, 6\) of w \(10 in all\) are held by no rank"):
        assign([[Piece("w", 0, 4, 10, "F32")], [Piece("w", 6, 4, 10, "F32")]])


def test_ranks_that_disagree_about_a_tensor_are_refused():
    with pytest.raises(PlanError, match="w has 11 elements of F32 on rank 1, elsewhere 10 of F32"):
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
def test_a_fragment_that_is_no_flat_slice_is_refused_by_name(fragment, text):
    with pytest.raises(PlanError, match=f"fragment layer.w .*{text}"):
        table({"layer.w": fragment})


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 70_000), st.sampled_from(sorted(DTYPES))), min_size=1, max_size=6),
    st.integers(1 << 16, 1 << 18),
)
def test_files_are_safetensors_within_the_size_and_hold_every_element_aligned(tensors, max_file_bytes):
    pieces = [Piece(f"name.{i}", 0, numel, numel, dtype) for i, (numel, dtype) in enumerate(tensors)]
    parts = pack(pieces, "rank_00000/state", max_file_bytes)
    staging = Staging()
    staging.lay_out(parts)
    contents = {}
    for i, (numel, dtype) in enumerate(tensors):
        bits = torch.randint(0, 2 if dtype == "BOOL" else 120, (numel * itemsize(dtype),), dtype=torch.uint8)
        contents[f"name.{i}"] = bits.view(DTYPES[dtype])
    staging.fill({name: Fragment(tensor, 0, tensor.numel()) for name, tensor in contents.items()})
    back: dict[str, list[torch.Tensor]] = {name: [] for name in contents}
    for index, part in enumerate(parts):
        data = bytes(staging.data(index))
        assert len(data) == part.num_bytes <= max_file_bytes
        stored = load_safetensors(data)
        for piece, offset in part.pieces:
            assert offset % itemsize(piece.dtype) == 0
            back[piece.name].append(stored[f"{piece.name}[{piece.start}:{piece.start + piece.numel}]"])
    for name, tensor in contents.items():
        assert torch.equal(torch.cat(back[name]).view(torch.uint8), tensor.view(torch.uint8))
    assert sum(p[1] for entry in layout_of(parts).values() for p in entry["pieces"]) == sum(n for n, _ in tensors)


def test_staging_costs_no_more_than_the_share_and_headers():
    pieces = [Piece(f"layer.{i}.master", 0, 100_000, 100_000, "F32") for i in range(50)]
    staging = Staging()
    staging.lay_out(pack(pieces, "rank_00000/state", 1 << 20))
    assert staging.num_bytes <= 1.01 * sum(piece.num_bytes for piece in pieces)


def test_own_state_survives_text_and_tensors_unchanged():
    state = {"rng": torch.arange(5, dtype=torch.uint8), "list": [1, 0.1, None, {"w": torch.ones(2, 3)}], "s": "x"}
    plain, tensors = split(state)
    back = join(plain, {name: tensor.reshape(-1) for name, tensor in tensors.items()})
    assert torch.equal(back["rng"], state["rng"]) and torch.equal(back["list"][3]["w"], torch.ones(2, 3))
    assert back["list"][:3] == [1, 0.1, None] and back["s"] == "x"


@pytest.mark.parametrize("value", [{1: "a"}, {"a": {3}}, {"a": b"bytes"}, {"a": object()}, {"__tensor__": "x"}])
def test_what_would_need_a_pickle_is_refused_by_name(value):
    with pytest.raises(CheckpointError, match=r"^state(\.a)? "):
        canonical_json(value)
