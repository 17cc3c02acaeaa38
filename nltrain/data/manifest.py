"""The manifest: what a dataset consists of. It is written last and atomically, so a dataset is complete or absent.

One manifest.json at the dataset's prefix names the tokenizer, the sequence length and, for each split, every shard
with its size, counts and SHA-256. A split's `fingerprint` changes with any of its sequences.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nltrain.data.errors import DataError
from nltrain.data.shards import Shard
from nltrain.store import MissingObjectError, Store
from nltrain.store.places import join_url

FORMAT = "nltrain-tokens-1"
MANIFEST_KEY = "manifest.json"
TOKENIZER_KEY = "tokenizer.json"


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order, and their sums."""

    shards: tuple[Shard, ...]

    @property
    def num_sequences(self) -> int:
        """Sequences of all shards."""
        return sum(shard.num_sequences for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards; the overlaps are counted once."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_targets(self) -> int:
        """Positions with a target; padding has none."""
        return sum(shard.num_targets for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents that begin in the shards."""
        return sum(shard.num_documents for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    seq_len: int
    dtype: str
    """NumPy name of the stored token type: uint16 or uint32."""
    vocab_size: int
    separator_id: int | None
    tokenizer_sha256: str
    splits: dict[str, Split]
    report: dict[str, Any] = field(default_factory=dict)
    """How the dataset was made: settings, tokens in and out, dropped records by reason."""

    def fingerprint(self, split: str) -> str:
        """32 hex digits that change with any sequence of the split, its place, the tokenizer or the sequence length."""
        identity = {
            "format": FORMAT,
            "seq_len": self.seq_len,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_sha256,
            "shards": [[shard.sha256, shard.num_sequences] for shard in self.splits[split].shards],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """Its JSON; equal manifests give equal bytes."""
        content: dict[str, Any] = {"format": FORMAT}
        content |= {name: value for name, value in vars(self).items() if name not in ("splits", "report")}
        content["splits"] = {
            name: {
                "fingerprint": self.fingerprint(name),
                "num_sequences": split.num_sequences,
                "num_tokens": split.num_tokens,
                "num_targets": split.num_targets,
                "num_documents": split.num_documents,
                "shards": [asdict(shard) for shard in split.shards],
            }
            for name, split in sorted(self.splits.items())
        }
        content["report"] = self.report
        content["sha256"] = _content_sha256(content)
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, url: str) -> "Manifest":
        """The manifest of these bytes; `url` names it in errors. Raises DataError when they are damaged."""
        try:
            content = json.loads(data)
            if content.pop("sha256") != _content_sha256(content):
                raise ValueError("its checksum does not match")
            splits = {
                name: Split(tuple(Shard(**shard) for shard in split["shards"]))
                for name, split in content["splits"].items()
            }
            if content["format"] != FORMAT:
                raise DataError(f"{url}: format {content['format']!r}, this version reads {FORMAT!r}: prepare it again")
            names = ("seq_len", "dtype", "vocab_size", "separator_id", "tokenizer_sha256", "report")
            manifest = cls(splits=splits, **{name: content[name] for name in names})
            np.dtype(manifest.dtype)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{url}: not a dataset manifest, or a truncated or altered one ({type(error).__name__}: {error}): "
                "prepare the dataset again"
            ) from error
        return manifest


def _content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(store: Store) -> Manifest:
    """The manifest at the store's prefix. Raises DataError when there is none or it is damaged."""
    url = join_url(store.url, MANIFEST_KEY)
    try:
        data = store.get(MANIFEST_KEY)
    except MissingObjectError as error:
        raise DataError(
            f"{url}: no prepared dataset there (empty prefix, or prepare did not finish): "
            "check data.prefix or run jobs/prepare_shards.py"
        ) from error
    try:
        return Manifest.parse(data, url)
    except DataError:
        # The transfer may have damaged it: a second read decides.
        return Manifest.parse(store.get(MANIFEST_KEY), url)
