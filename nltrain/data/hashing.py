"""Hashes that never change with a library's version. The order of samples and the choice of documents depend on them.

`mix64` is the finaliser of splitmix64 on uint64 arrays; `key64` folds names and numbers into one 64-bit key.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def key64(*parts: str | int) -> int:
    """A 64-bit key of the parts; different splits of the same text give different keys."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode("utf-8", "surrogateescape")  # file names may be any bytes
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """Pseudo-random uint64 for each value under `key`; same shape."""
    with np.errstate(over="ignore"):
        mixed = values.astype(np.uint64) * _GOLDEN + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
        return mixed ^ (mixed >> np.uint64(31))


def unit_hash(*parts: str | int) -> float:
    """A number in [0, 1) that depends only on the parts."""
    return key64(*parts) / 2**64
