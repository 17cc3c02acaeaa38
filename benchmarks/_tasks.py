"""Formal languages and recall as next-class prediction: token ids in, one class per position out, -100 where ignored.

For a language the class of a position is the set of symbols that may follow (the end of the string among them), as in
Bhattamishra et al. 2020; parity asks for the running parity. Each sampler takes (length, count, generator).
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Sampler = Callable[[int, int, Generator], tuple[Tensor, Tensor]]
IGNORED = -100


def parity(length: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Bits; class: number of ones so far, modulo 2."""
    bits = torch.randint(0, 2, (count, length), generator=generator)
    return bits, bits.cumsum(1) % 2


def _period(word: list[int]) -> Sampler:
    def sample(length: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(word).repeat(length // len(word) + 1)[:length].expand(count, -1)
        # Class: position in the word; only at its end may the string end, elsewhere one symbol may follow.
        ends = (torch.arange(1, length + 1) % len(word) == 0).long()
        follows = torch.tensor([*word[1:], word[0]]).repeat(length // len(word) + 1)[:length]
        return tokens.clone(), (2 * follows + ends).expand(count, -1).clone()

    return sample


def _counted(num_symbols: int) -> Sampler:
    """a^n b^n (c^n): after the first b everything is determined."""

    def sample(length: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        n = torch.randint(1, max(2, length // num_symbols + 1), (count, 1), generator=generator)
        at = torch.arange(length).expand(count, -1)
        tokens = torch.minimum(at // n, torch.tensor(num_symbols - 1))
        follows = (at + 1) // n
        # While a's come, a or b may follow (class 0); later exactly one symbol, or the end (class num_symbols).
        targets = torch.where(at < n, 0, follows.clamp_max(num_symbols))
        return tokens, torch.where(at < num_symbols * n, targets, IGNORED)

    return sample


def shuffle2(length: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Two kinds of brackets, interleaved freely; class: which of the two may close (and the end, when neither)."""
    tokens = torch.zeros(count, length, dtype=torch.long)
    depth = torch.zeros(count, 2, dtype=torch.long)
    targets = torch.zeros(count, length, dtype=torch.long)
    rows = torch.arange(count)
    for t in range(length):
        kind = torch.randint(0, 2, (count,), generator=generator)
        closes = (torch.rand(count, generator=generator) < 0.5) & (depth[rows, kind] > 0)
        tokens[:, t] = 2 * kind + closes
        depth[rows, kind] += torch.where(closes, -1, 1)
        targets[:, t] = (depth[:, 0] > 0) + 2 * (depth[:, 1] > 0)
    return tokens, targets


def recall(num_pairs: int, num_symbols: int, num_overwritten: int = 0) -> Sampler:
    """Multi-query associative recall: fresh pairs, then all keys in a random order; class of a key: its value.

    Keys of a sequence differ, values may repeat. No answer is shown, so that none can be had by elimination. With
    `num_overwritten` that many of the keys, in a random order, get another value after all pairs; the last one counts.
    """

    def sample(_: int, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        keys = torch.rand(count, num_symbols, generator=generator).argsort(1)[:, :num_pairs]
        values = torch.randint(0, num_symbols, (count, num_pairs), generator=generator) + num_symbols
        shown = torch.stack([keys, values], -1).flatten(1)
        if num_overwritten:
            again = torch.rand(count, num_pairs, generator=generator).argsort(1)[:, :num_overwritten]
            # Another value than the first one: a step of 1 to num_symbols - 1 around the circle of values.
            step = torch.randint(1, num_symbols, (count, num_overwritten), generator=generator)
            new = (values.gather(1, again) - num_symbols + step) % num_symbols + num_symbols
            values = values.scatter(1, again, new)
            shown = torch.cat([shown, torch.stack([keys.gather(1, again), new], -1).flatten(1)], 1)
        order = torch.rand(count, num_pairs, generator=generator).argsort(1)
        tokens = torch.cat([shown, keys.gather(1, order)], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, shown.shape[1] :] = values.gather(1, order)
        return tokens, targets

    return sample


LANGUAGES: dict[str, Sampler] = {
    "parity": parity,
    "(aa)*": _period([0, 0]),
    "(abab)*": _period([0, 1, 0, 1]),
    "a^n b^n": _counted(2),
    "a^n b^n c^n": _counted(3),
    "shuffle-2": shuffle2,
}
NUM_CLASSES = 6


def accuracy(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """Shares of positions and of whole sequences that are right, ignored positions left out."""
    real = targets != IGNORED
    right = (predicted == targets) | ~real
    return (right & real).sum().item() / real.sum().item(), right.all(1).double().mean().item()
