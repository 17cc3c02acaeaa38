"""The shard format: a webdataset tar whose members hold packed sequences, and an index beside it.

A member is two tar entries of one key: `.starts` (uint32 positions of document starts) and `.tokens` (uint16 or
uint32). A member of n sequences holds n * seq_len + 1 tokens: neighbours overlap by one, so each token except a group's
first is the target of exactly one position. All members of a shard except the last hold the same number of sequences.
Guarantees: equal tokens give equal bytes (tar mtime 0, no names of machines or users); the index has the offset, length
and CRC-32 of each entry, the manifest the SHA-256 of each shard and index. Limits: a shard is built in memory.
"""

import hashlib
import io
import json
import zlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import webdataset

from nltrain.data.errors import DataError

FORMAT = "nltrain-shard-1"
TAR_BLOCK_BYTES = 512
STARTS_DTYPE = np.dtype("<u4")


class Entry(NamedTuple):
    """Where one tar entry's data lies in its shard."""

    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Member:
    """One member of a shard, as its index lists it."""

    key: str
    num_sequences: int
    num_tokens: int
    """Tokens that are not padding, including the one shared with the next member."""
    num_documents: int
    starts: Entry
    tokens: Entry


@dataclass(frozen=True)
class Shard:
    """What the manifest records of one shard."""

    key: str
    num_bytes: int
    sha256: str
    index_key: str
    index_sha256: str
    num_sequences: int
    num_tokens: int
    """Tokens that this shard adds to the dataset; the overlaps are counted once."""
    num_targets: int
    num_documents: int


class FinishedShard(NamedTuple):
    """A shard and its index, ready to be stored."""

    shard: Shard
    data: bytes
    index_data: bytes


class ShardPacker:
    """Packs the documents of one group into sequences, members and shards of one split."""

    def __init__(self, key_prefix: str, seq_len: int, dtype: np.dtype, bytes_per_member: int, bytes_per_shard: int):
        self.key_prefix, self.seq_len, self.dtype = key_prefix, seq_len, dtype
        self.sequences_per_member = max(1, bytes_per_member // (seq_len * dtype.itemsize))
        self.bytes_per_shard = bytes_per_shard
        self.num_shards = 0
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._starts: list[int] = []  # of documents, relative to the first pending token
        self._first_of_group = True
        self._open_shard()

    def add(self, tokens: np.ndarray, starts_document: bool = True) -> list[FinishedShard]:
        """Appends one document, or the next passage of the last one; returns the shards that became full."""
        if len(tokens) == 0:
            return []
        if starts_document:
            self._starts.append(self._num_pending)
        self._pending.append(tokens.astype(self.dtype))
        self._num_pending += len(tokens)
        full = self.sequences_per_member * self.seq_len + 1
        return self._cut(full) if self._num_pending >= full else []

    def finish(self) -> list[FinishedShard]:
        """Pads the last sequence and closes the last shard; returns it, unless nothing is left to store."""
        finished = []
        # After a member one token is pending that the member already holds.
        num_left = 1 if self._first_of_group else 2
        if self._num_pending >= num_left or self._starts:
            tokens = np.concatenate(self._pending)
            num_sequences = max(1, -(-(len(tokens) - 1) // self.seq_len))
            # A last document of one token is only a target so far: a sequence without targets stores its start.
            num_sequences += bool(self._starts) and self._starts[-1] == num_sequences * self.seq_len
            padded = np.zeros(num_sequences * self.seq_len + 1, self.dtype)
            padded[: len(tokens)] = tokens
            finished += self._write_member(padded, num_sequences, len(tokens), self._starts)
        self._pending, self._num_pending, self._starts = [], 0, []
        return finished + self._close_shard()

    def _cut(self, full: int) -> list[FinishedShard]:
        finished = []
        tokens, starts = np.concatenate(self._pending), np.array(self._starts)
        first = 0
        while len(tokens) - first >= full:
            end = first + full - 1  # the next member begins with this member's last token
            own = starts[(starts >= first) & (starts < end)] - first
            finished += self._write_member(tokens[first : first + full], self.sequences_per_member, full, own)
            first = end
        self._pending, self._num_pending = [tokens[first:]], len(tokens) - first
        self._starts = [int(start - first) for start in starts if start >= first]
        return finished

    def _write_member(
        self, tokens: np.ndarray, num_sequences: int, num_tokens: int, starts: Any
    ) -> list[FinishedShard]:
        key = f"{len(self._members):06d}"
        payloads = {"starts": np.asarray(starts, STARTS_DTYPE).tobytes(), "tokens": tokens.tobytes()}
        offset = self._tar.tarstream.offset
        self._tar.write({"__key__": key, **payloads})
        entries = {}
        for name in sorted(payloads):  # the order in which webdataset writes them
            data = payloads[name]
            entries[name] = Entry(offset + TAR_BLOCK_BYTES, len(data), zlib.crc32(data))
            offset += TAR_BLOCK_BYTES + -(-len(data) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if offset != self._tar.tarstream.offset:
            raise AssertionError("webdataset's tar writer no longer writes one header block per entry")
        self._members.append(Member(key, num_sequences, num_tokens, len(starts), **entries))
        self._num_new_tokens += num_tokens - (0 if self._first_of_group else 1)
        self._first_of_group = False
        return self._close_shard() if offset >= self.bytes_per_shard else []

    def _open_shard(self) -> None:
        self._buffer = io.BytesIO()
        # A float mtime, 0.0 included, would cost 1.5 KB of extra header per entry.
        self._tar = webdataset.TarWriter(self._buffer, encoder=False, mtime=0, user="", group="", mode=0o444)
        self._members: list[Member] = []
        self._num_new_tokens = 0

    def _close_shard(self) -> list[FinishedShard]:
        if not self._members:
            return []
        self._tar.close()
        data = self._buffer.getvalue()
        key = f"{self.key_prefix}-{self.num_shards:05d}"
        index = {
            "format": FORMAT,
            "seq_len": self.seq_len,
            "dtype": self.dtype.name,
            "num_bytes": len(data),
            "members": [asdict(member) for member in self._members],
        }
        index_data = (json.dumps(index, indent=None, separators=(",", ":")) + "\n").encode()
        shard = Shard(
            key=f"{key}.tar",
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            index_key=f"{key}.index.json",
            index_sha256=hashlib.sha256(index_data).hexdigest(),
            num_sequences=sum(member.num_sequences for member in self._members),
            num_tokens=self._num_new_tokens,
            num_targets=sum(member.num_tokens - 1 for member in self._members),
            num_documents=sum(member.num_documents for member in self._members),
        )
        self.num_shards += 1
        self._open_shard()
        return [FinishedShard(shard, data, index_data)]


@dataclass(frozen=True)
class ShardIndex:
    """The index of a shard: its members and where they lie."""

    seq_len: int
    dtype: np.dtype
    members: tuple[Member, ...]

    @property
    def sequences_per_member(self) -> int:
        """Sequences of each member except the last, which may hold fewer."""
        return self.members[0].num_sequences

    @classmethod
    def parse(cls, data: bytes, url: str, sha256: str) -> "ShardIndex":
        """The index of these bytes. Raises DataError when their SHA-256 is not the manifest's."""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(
                f"{url}: the index ({len(data)} bytes) is truncated or altered: its SHA-256 is not the manifest's: "
                "restore it or prepare the dataset again"
            )
        fields = json.loads(data)
        members = [
            Member(**member | {"starts": Entry(*member["starts"]), "tokens": Entry(*member["tokens"])})
            for member in fields["members"]
        ]
        return cls(fields["seq_len"], np.dtype(fields["dtype"]).newbyteorder("<"), tuple(members))


class Sequence(NamedTuple):
    """One packed sequence: seq_len inputs and as many targets, shifted by one."""

    tokens: np.ndarray  # [seq_len + 1], the dataset's dtype
    starts: np.ndarray  # positions of document starts, ascending, in [0, seq_len)
    num_targets: int  # the targets of later positions are padding


class MemberView:
    """The sequences of one member, as views of its bytes."""

    def __init__(self, member: Member, seq_len: int, dtype: np.dtype, starts: np.ndarray, tokens: np.ndarray):
        self.member, self.seq_len, self.dtype, self.starts, self.tokens = member, seq_len, dtype, starts, tokens

    @classmethod
    def cut(cls, index: ShardIndex, position: int, data: memoryview, base: int = 0) -> "MemberView":
        """The member at `position` of its shard; `data` begins at the shard's byte `base`."""
        member = index.members[position]
        starts, tokens = (
            np.frombuffer(data[entry.offset - base : entry.offset - base + entry.num_bytes], dtype)
            for entry, dtype in ((member.starts, STARTS_DTYPE), (member.tokens, index.dtype))
        )
        return cls(member, index.seq_len, index.dtype, starts, tokens)

    def is_intact(self) -> bool:
        """Whether both entries have the CRC-32 that the index names."""
        return all(
            zlib.crc32(data.data) == entry.crc32
            for data, entry in ((self.starts, self.member.starts), (self.tokens, self.member.tokens))
        )

    def sequence(self, slot: int) -> Sequence:
        """The sequence at `slot` of this member."""
        first = slot * self.seq_len
        lower, upper = self.starts.searchsorted((first, first + self.seq_len))
        num_targets = min(self.seq_len, self.member.num_tokens - 1 - first)
        return Sequence(
            self.tokens[first : first + self.seq_len + 1],
            self.starts[lower:upper].astype(np.int64) - first,
            num_targets,
        )


def member_range(member: Member) -> tuple[int, int]:
    """(start, length) of the byte range that holds both entries of a member."""
    return member.starts.offset, member.tokens.offset + member.tokens.num_bytes - member.starts.offset
