"""Texts that memories must survive, as byte tokens: repetitions of every period, padding, and text of several kinds.

Repetition is the hard case. The keys of equal tokens are equal, so that stale gradients of one chunk add up.
"""

import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

VOCAB = 256


def _cycle(length: int, period: int, generator: Generator) -> Tensor:
    word = torch.randperm(VOCAB, generator=generator)[:period]
    return word.repeat(-(-length // period))[:length]


def _runs(length: int, run: int, generator: Generator) -> Tensor:
    symbols = torch.randint(0, VOCAB, (-(-length // run),), generator=generator)
    return symbols.repeat_interleave(run)[:length]


def _drawn(length: int, alphabet: bytes, generator: Generator) -> Tensor:
    symbols = torch.tensor(list(alphabet))
    return symbols[torch.randint(0, len(symbols), (length,), generator=generator)]


@cache
def _library() -> Tensor:
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py"))[:120])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _real(length: int, generator: Generator) -> Tensor:
    text = _library()
    at = int(torch.randint(0, len(text) - length, (), generator=generator))
    return text[at : at + length]


def _indented(length: int, generator: Generator) -> Tensor:
    """Deeply indented code: runs of up to 40 spaces between short lines of one statement."""
    lines, size = [], 0
    while size < length:
        depth, name = torch.randint(1, 11, (2,), generator=generator).tolist()
        lines.append(b" " * (4 * depth) + b"x%d = f(x%d)\n" % (name, depth))
        size += len(lines[-1])
    return torch.tensor(list(b"".join(lines)[:length]))


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

# name: (length, generator) -> token ids [length]
TEXTS: dict[str, Callable[[int, Generator], Tensor]] = {
    "constant": lambda n, g: _cycle(n, 1, g),
    "period 2": lambda n, g: _cycle(n, 2, g),
    "period 3": lambda n, g: _cycle(n, 3, g),
    "period 7": lambda n, g: _cycle(n, 7, g),
    "runs of 16": lambda n, g: _runs(n, 16, g),
    "runs of 200": lambda n, g: _runs(n, 200, g),
    "runs of 2,048": lambda n, g: _runs(n, 2048, g),
    "four random symbols": lambda n, g: _drawn(n, bytes(torch.randperm(VOCAB, generator=g)[:4].tolist()), g),
    "padding": lambda n, g: torch.zeros(n, dtype=torch.long),
    "indented code": _indented,
    "base64 line": lambda n, g: _drawn(n, BASE64, g),
    "DNA line": lambda n, g: _drawn(n, b"ACGT", g),
    "real text": _real,
}


def text(name: str, length: int, seed: int) -> Tensor:
    """Token ids [length] of one text; a pure function of its arguments and, for real text, of the running Python."""
    return TEXTS[name](length, torch.Generator().manual_seed(seed))
