"""The reference entropies against their formulas, by hand."""

import math

import numpy as np
import pytest

from nltrain.evaluate.entropy import bigram_entropy, unigram_entropy

TRAIN, HELD_OUT = [np.array([0, 1, 0, 1, 2])], [np.array([0, 1, 0])]


def test_unigram_is_add_one():
    assert unigram_entropy(TRAIN, HELD_OUT, 3) == pytest.approx(-(math.log(3 / 8) + math.log(3 / 8)) / 2)


def test_bigram_interpolates_with_the_unigram():
    # 0 is followed by 1 twice (one kind); 1 by 0 and 2 (two kinds).
    p_01, p_10 = (2 + 1 * 3 / 8) / (2 + 1), (1 + 2 * 3 / 8) / (2 + 2)
    assert bigram_entropy(TRAIN, HELD_OUT, 3) == pytest.approx(-(math.log(p_01) + math.log(p_10)) / 2)
