"""The `data` section of a run: which datasets, in which order, with how much cache and memory."""

import os
import tempfile
from dataclasses import dataclass

from nltrain.errors import require


def _default_cache_dir() -> str:
    # One folder per user: ranks of a node and later runs share it.
    return os.path.join(tempfile.gettempdir(), f"nltrain-cache-{os.getuid()}")


@dataclass(frozen=True)
class DataConfig:
    """One or several prepared datasets and how they are streamed."""

    prefix: str = ""
    """URL of a prepared dataset (s3://bucket/prefix or a folder); several are separated by commas."""
    seq_len: int = 1024
    """Tokens per sequence; must be what the dataset was prepared with."""
    split: str = "train"
    """Split of the datasets to read: train or validation."""
    weights: tuple[float, ...] = ()
    """Share of the samples from each prefix, in their order; empty: in proportion to their sequences."""
    seed: int = 0
    """Seed of the order of samples; the initial weights have their own (`train.seed`)."""
    window_shards: int = 16
    """Shards of a window, within which samples are permuted; more mixes better and needs more cache."""
    cache_dir: str = ""
    """Local folder for shards, shared by the ranks of a node; empty: one in the machine's temporary folder."""
    cache_bytes: int = 8 << 30
    """Size limit of the cache folder, in bytes; must hold two windows of shards."""
    buffer_bytes: int = 64 << 20
    """Memory limit of transfers in flight and batches made ready, in bytes; a quarter of it is for transfers."""
    prefetch_batches: int = 8
    """Batches made ready ahead of the consumer, within buffer_bytes."""
    download_threads: int = 4
    """Shards fetched at once by a rank."""
    range_read_batches: int = 2
    """Number of batches after a start that are read by range, without waiting for whole shards."""
    attempts: int = 7
    """Tries of each request before a transient failure stops the run."""
    timeout_s: float = 20.0
    """Seconds without data on a connection after which a request is tried again."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "window_shards", "cache_bytes", "buffer_bytes", "prefetch_batches"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        for name in ("download_threads", "attempts", "timeout_s"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "must be positive")
        number = self.range_read_batches
        require(number >= 0, "data.range_read_batches", number, "must be at least 0")
        counts = f"{len(self.weights)} weights for {len(self.prefixes)} prefixes"
        fit = len(self.weights) in (0, len(self.prefixes))
        require(fit, "data.weights", self.weights, f"{counts}: give one each, or none")
        positive = all(weight > 0 for weight in self.weights)
        require(positive, "data.weights", self.weights, "each must be positive; leave a prefix out instead of 0")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The URLs of `prefix`."""
        return tuple(part.strip() for part in self.prefix.split(",") if part.strip())

    @property
    def cache_folder(self) -> str:
        """`cache_dir`, or its default."""
        return self.cache_dir or _default_cache_dir()
