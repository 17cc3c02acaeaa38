"""What a run says about its data. Everything that decides which sample comes when is here and enters the state."""

import os
import tempfile
from dataclasses import dataclass, field

from nltrain.errors import require
from nltrain.settings import MAY_CHANGE, MAY_CHANGE_WITH_DATA


def _default_cache_dir() -> str:
    # One folder per user: ranks of a node and later runs share it.
    return os.path.join(tempfile.gettempdir(), f"nltrain-cache-{os.getuid()}")


@dataclass(frozen=True)
class DataConfig:
    """One or several prepared datasets and how they are streamed."""

    # The same data may lie elsewhere on resume: their fingerprint is compared instead.
    prefix: str = field(default="", metadata=MAY_CHANGE)
    """URL of a prepared dataset (s3://bucket/prefix or a folder); several are separated by commas."""
    seq_len: int = 1024
    """Tokens per sequence; must be what the dataset was prepared with."""
    split: str = field(default="train", metadata=MAY_CHANGE_WITH_DATA)
    """Split of the datasets to read: train or validation."""
    weights: tuple[float, ...] = field(default=(), metadata=MAY_CHANGE_WITH_DATA)
    """Share of the samples from each prefix, in their order; empty: in proportion to their sequences."""
    seed: int = field(default=0, metadata=MAY_CHANGE_WITH_DATA)
    """Seed of the order of samples; the initial weights have their own (`train.seed`)."""
    window_shards: int = field(default=16, metadata=MAY_CHANGE_WITH_DATA)
    """Shards of a window, within which samples are permuted; more mixes better and needs more cache."""
    cache_dir: str = field(default="", metadata=MAY_CHANGE)
    """Local folder for shards, shared by the ranks of a node; empty: one in the machine's temporary folder."""
    cache_bytes: int = field(default=8 << 30, metadata=MAY_CHANGE)
    """Size limit of the cache folder, in bytes; must hold two windows of shards."""
    buffer_bytes: int = field(default=64 << 20, metadata=MAY_CHANGE)
    """Memory limit of transfers in flight and batches made ready, in bytes; a quarter of it is for transfers."""
    prefetch_batches: int = field(default=8, metadata=MAY_CHANGE)
    """Batches made ready ahead of the consumer, within buffer_bytes."""
    download_threads: int = field(default=4, metadata=MAY_CHANGE)
    """Shards fetched at once by a rank."""
    range_read_batches: int = field(default=2, metadata=MAY_CHANGE)
    """Number of batches after a start that are read by range, without waiting for whole shards."""
    attempts: int = field(default=7, metadata=MAY_CHANGE)
    """Tries of each request before a transient failure stops the run."""
    timeout_s: float = field(default=20.0, metadata=MAY_CHANGE)
    """Seconds without data on a connection after which a request is tried again."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "window_shards", "cache_bytes", "buffer_bytes", "prefetch_batches"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}", value, "must be at least 1")
        for name in ("download_threads", "attempts", "timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"data.{name}", value, "must be positive")
        require(self.range_read_batches >= 0, "data.range_read_batches", self.range_read_batches, "must be at least 0")
        require(
            not self.weights or len(self.weights) == len(self.prefixes),
            "data.weights",
            self.weights,
            f"{len(self.weights)} weights for {len(self.prefixes)} prefixes: give one each, or none",
        )
        require(
            all(weight > 0 for weight in self.weights),
            "data.weights",
            self.weights,
            "each must be positive; leave a prefix out instead of 0",
        )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The URLs of `prefix`."""
        return tuple(part.strip() for part in self.prefix.split(",") if part.strip())

    @property
    def cache_folder(self) -> str:
        """`cache_dir`, or its default."""
        return self.cache_dir or _default_cache_dir()
