"""Files are safetensors of bounded size; staging takes little more memory than what it holds."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from safetensors.torch import load as load_safetensors

from nltrain.checkpoint.files import Staging, layout_of, pack
from nltrain.checkpoint.shares import DTYPES, Piece, itemsize
from nltrain.fragment import Fragment


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 70_000), st.sampled_from(sorted(DTYPES))), min_size=1, max_size=6),
    st.integers(1 << 16, 1 << 18),
)
def test_files_are_safetensors_within_the_size_and_hold_every_element_aligned(
    tensors: list[tuple[int, str]], max_file_bytes: int
) -> None:
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


def test_staging_costs_no_more_than_the_share_and_headers() -> None:
    pieces = [Piece(f"layer.{i}.master", 0, 100_000, 100_000, "F32") for i in range(50)]
    staging = Staging()
    staging.lay_out(pack(pieces, "rank_00000/state", 1 << 20))
    assert staging.num_bytes <= 1.01 * sum(piece.num_bytes for piece in pieces)
