"""What a run says about its data. Everything that decides which sample comes when is here and enters the state."""

import os
import tempfile
from dataclasses import dataclass

from nltrain.data.errors import DataError


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
    """Decides the order of samples, alone."""
    window_shards: int = 16
    """Samples mix within this many shards, drawn anew each epoch; more mixes better and needs more cache."""
    cache_dir: str = ""
    """Local folder for shards, shared by the ranks of a node; empty: one in the machine's temporary folder."""
    cache_bytes: int = 8 << 30
    """Size limit of the cache folder; must hold two windows of shards."""
    buffer_bytes: int = 64 << 20
    """Memory limit of downloads in flight and batches ready, in bytes; downloads take a quarter of it."""
    prefetch_batches: int = 8
    """Batches made ready ahead of the consumer, within buffer_bytes."""
    download_threads: int = 4
    """Shards fetched at once by a rank."""
    range_read_batches: int = 2
    """First batches after a start that are read by range instead of waiting for whole shards."""
    attempts: int = 7
    """Tries of each request before a transient failure stops the run."""
    timeout_s: float = 20.0
    """Silence on a connection after which a request is tried again, in seconds."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "window_shards", "cache_bytes", "buffer_bytes", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise DataError(f"data.{name}: {getattr(self, name)}: must be at least 1")
        for name in ("download_threads", "attempts", "timeout_s"):
            if getattr(self, name) <= 0:
                raise DataError(f"data.{name}: {getattr(self, name)}: must be positive")
        if self.range_read_batches < 0:
            raise DataError(f"data.range_read_batches: {self.range_read_batches}: must be at least 0")
        if self.weights and len(self.weights) != len(self.prefixes):
            raise DataError(
                f"data.weights: {len(self.weights)} weights for {len(self.prefixes)} prefixes: give one each, or none"
            )
        if any(not weight > 0 for weight in self.weights):
            raise DataError(f"data.weights: {self.weights}: each must be positive; leave a prefix out instead of 0")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The URLs of `prefix`."""
        return tuple(part.strip() for part in self.prefix.split(",") if part.strip())

    @property
    def cache_folder(self) -> str:
        """`cache_dir`, or its default."""
        return self.cache_dir or _default_cache_dir()
