"""One split of a prepared dataset, opened for reading: manifest, tokenizer, shards.

Opening reads only the manifest: one request, whatever the dataset's size. Indexes and shards are read when they are
needed and checked against the manifest's hashes.
"""

import hashlib
import threading
from collections.abc import Iterator
from typing import Self

import numpy as np
from tokenizers import Tokenizer

from nltrain.data.errors import DataError
from nltrain.data.manifest import TOKENIZER_KEY, read_manifest
from nltrain.data.shards import MemberView, Sequence, ShardIndex
from nltrain.data.tokenizer import tokenizer_from_bytes
from nltrain.store import Store, open_store
from nltrain.store.places import join_url

INDEX_TRANSFERS = 3
INDEXES_HELD = 256


class TokenDataset:
    """One split of a prepared dataset."""

    def __init__(self, store: Store, split: str = "train"):
        """Raises DataError when there is no dataset, no such split, or no sequence in it."""
        self.store, self.split = store, split
        self.url = store.url
        self.manifest = read_manifest(store)
        if split not in self.manifest.splits:
            known = ", ".join(sorted(self.manifest.splits))
            raise DataError(f"data.split: {split!r} is not in {self.url}: it has {known}")
        self.shards = self.manifest.splits[split].shards
        if not self.shards:
            raise DataError(
                f"{self.url}: split {split!r} holds no sequences: prepare more documents"
                + (" or a larger validation_fraction" if split == "validation" else "")
            )
        self.fingerprint = self.manifest.fingerprint(split)
        self.sequences_per_shard = np.array([shard.num_sequences for shard in self.shards], np.int64)
        self.num_sequences = int(self.sequences_per_shard.sum())
        self.num_tokens = self.manifest.splits[split].num_tokens
        self.num_targets = self.manifest.splits[split].num_targets
        self.seq_len = self.manifest.seq_len
        self.vocab_size = self.manifest.vocab_size
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._indexes: dict[int, ShardIndex] = {}
        self._indexes_lock = threading.Lock()

    @classmethod
    def open(cls, store: Store | str, split: str = "train") -> Self:
        """The split of the dataset at a store or a URL."""
        return cls(open_store(store) if isinstance(store, str) else store, split)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the dataset. Raises DataError when the file was altered since."""
        url = join_url(self.url, TOKENIZER_KEY)
        data = self.store.get(TOKENIZER_KEY)
        if hashlib.sha256(data).hexdigest() != self.manifest.tokenizer_sha256:
            raise DataError(f"{url}: altered since the dataset was prepared: restore it or prepare again")
        return tokenizer_from_bytes(data, url)

    def shard_url(self, shard: int) -> str:
        """URL of a shard."""
        return join_url(self.url, self.shards[shard].key)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; the last INDEXES_HELD are kept. Raises DataError when it is damaged."""
        index = self._indexes.get(shard)
        if index is None:
            stored = self.shards[shard]
            for _ in range(INDEX_TRANSFERS):  # a transfer may damage it
                data = self.store.get(stored.index_key)
                if hashlib.sha256(data).hexdigest() == stored.index_sha256:
                    break
            index = ShardIndex.parse(data, join_url(self.url, stored.index_key), stored.index_sha256)
            with self._indexes_lock:  # readers are threads
                self._indexes[shard] = index
                while len(self._indexes) > INDEXES_HELD:
                    del self._indexes[next(iter(self._indexes))]
        return index

    def check_shard(self, shard: int, data: bytes | memoryview) -> None:
        """Raises DataError, naming the damaged members, when the bytes are not the shard's."""
        stored = self.shards[shard]
        if len(data) == stored.num_bytes and hashlib.sha256(data).hexdigest() == stored.sha256:
            return
        damage = f"{len(data)} of {stored.num_bytes} bytes"
        if len(data) == stored.num_bytes:
            index = self.index(shard)
            views = (MemberView.cut(index, i, memoryview(data)) for i in range(len(index.members)))
            damage = ", ".join(f"member {view.member.key}" for view in views if not view.is_intact()) or "tar headers"
        raise DataError(
            f"{self.shard_url(shard)}: checksum mismatch ({damage}): the shard is damaged; "
            "restore it or prepare the dataset again"
        )

    def sequences(self) -> Iterator[Sequence]:
        """All sequences in stored order; holds one shard at a time."""
        for shard in range(len(self.shards)):
            for view in self._members(shard):
                for slot in range(view.member.num_sequences):
                    yield view.sequence(slot)

    def tokens_by_group(self) -> Iterator[np.ndarray]:
        """The tokens of each group of documents, 1-D, without padding and overlaps; holds one group at a time."""
        found: list[np.ndarray] = []
        last_group = None
        for shard in range(len(self.shards)):
            group = self.shards[shard].key.rpartition("-")[0]
            if found and group != last_group:
                yield np.concatenate(found)
                found = []
            last_group = group
            for view in self._members(shard):
                found.append(view.tokens[(1 if found else 0) : view.member.num_tokens])
        if found:
            yield np.concatenate(found)

    def _members(self, shard: int) -> Iterator[MemberView]:
        data = self.store.get(self.shards[shard].key)
        self.check_shard(shard, data)
        index = self.index(shard)
        for position in range(len(index.members)):
            yield MemberView.cut(index, position, memoryview(data))
