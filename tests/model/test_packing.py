"""What a token may see of a packed batch: positions, taps of the convolution, keys of the attention."""

import torch

from kernels import MemoryRule
from nltrain.model.packing import Packing


def _starts(*at: int) -> torch.Tensor:
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, list(at)] = True
    return starts


def test_without_documents_inside_nothing_is_masked() -> None:
    for packing in (Packing.of((2, 6)), Packing.of((2, 6), _starts(0))):
        assert packing.starts is None and packing.taps_seen(3, torch.float32) is None
        assert packing.attention_mask(0) is None
        assert packing.positions[0].tolist() == [0, 1, 2, 3, 4, 5] and packing.next_position.tolist() == [6, 6]


def test_taps_and_keys_stay_inside_the_document() -> None:
    packing = Packing.of((2, 6), _starts(2))
    assert packing.positions[0].tolist() == [0, 1, 0, 1, 2, 3]
    taps, mask = packing.taps_seen(2, torch.float32), packing.attention_mask(0)
    assert taps is not None and mask is not None
    assert taps[0].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0], [1, 1], [1, 1]]
    assert mask[0, 0, 3].tolist() == [False, False, True, True, False, False]
    assert mask[1, 0, 3].tolist() == [True, True, True, True, False, False]


def test_a_continued_row_sees_its_past() -> None:
    packing = Packing.of((2, 6), _starts(0), torch.tensor([4, 4]))
    assert packing.positions[:, 0].tolist() == [0, 4]  # row 0 begins a document, row 1 continues one
    mask, taps = packing.attention_mask(4), packing.taps_seen(2, torch.float32)
    assert mask is not None and taps is not None
    assert mask[0, 0, 0].tolist() == [False] * 4 + [True] + [False] * 5
    assert mask[1, 0, 0].tolist() == [True] * 5 + [False] * 5
    assert taps[:, 0].tolist() == [[0, 0], [1, 1]]


def test_layers_share_one_layout() -> None:
    packing = Packing.of((2, 6))
    rule = MemoryRule(chunk_mem=4, chunk_other=4)
    assert packing.blocking(rule) is packing.blocking(MemoryRule(chunk_mem=4, chunk_other=4, momentum=True))
    assert packing.blocking(rule) is not packing.blocking(MemoryRule(chunk_mem=4, chunk_other=2))
