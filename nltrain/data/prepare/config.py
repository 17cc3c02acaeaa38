"""How documents become a dataset: the `prepare` section of jobs/prepare_shards.py."""

from dataclasses import dataclass

from nltrain.data.tokenizer import SEPARATOR
from nltrain.errors import require


@dataclass(frozen=True)
class PrepareConfig:
    """How documents become shards. Each field except max_bad_fraction changes the bytes written."""

    seq_len: int = 1024
    """Tokens per sequence: what a model reads at once."""
    validation_fraction: float = 0.01
    """Share of documents in the validation split, chosen by a hash of their names; 0: none."""
    separator: str | None = SEPARATOR
    """Token before each document; None: only the stored starts mark where documents begin."""
    bytes_per_member: int = 256 << 10
    """Bytes of the tokens of a tar member, which is the unit of range reads and of checksums."""
    bytes_per_shard: int = 16 << 20
    """Size in bytes at which a shard is closed."""
    seed: int = 0
    """Seed of the hashes that choose documents."""
    document_fraction: float = 1.0
    """Share of documents kept, chosen by a hash of their names, for a smaller dataset."""
    text_field: str = "text"
    """Field of a JSONL record or column of a parquet file that holds the text."""
    group_bytes: int = 256 << 20
    """Size in bytes up to which neighbouring input files form a group; one group is one task."""
    max_bad_fraction: float = 0.001
    """Share of all records that may be bad; with more of them no dataset is made."""
    max_record_bytes: int = 64 << 20
    """Longest JSON record or parquet cell, in bytes, which is held in memory whole; a longer one is bad."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "bytes_per_member", "bytes_per_shard", "group_bytes", "max_record_bytes"):
            require(getattr(self, name) >= 1, f"prepare.{name}", getattr(self, name), "must be at least 1")
        share = self.validation_fraction
        require(0 <= share < 1, "prepare.validation_fraction", share, "must be in [0, 1)")
        share = self.document_fraction
        require(0 < share <= 1, "prepare.document_fraction", share, "must be in (0, 1]")
        share = self.max_bad_fraction
        require(0 <= share <= 1, "prepare.max_bad_fraction", share, "must be in [0, 1]")
