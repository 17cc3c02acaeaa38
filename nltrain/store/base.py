"""What a store is: objects under one URL, addressed by relative keys; its errors, and what a key and a URL may be.

Guarantees of every store: `put` and `put_file` are atomic (a reader sees the old object, the new one or none),
`put_if_absent` is an atomic create, every read returns exactly the bytes asked for, and each failure is one
`StoreError` line with the URL and what to do. Limits: listing is not a snapshot.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from nltrain.errors import UserError
from nltrain.store.places import OtherPlace, PlaceError, S3Place, parse_place

NEEDED_STORE = "use AWS S3, a store with conditional writes (MinIO, Ceph and others have them) or a shared folder"


class StoreError(UserError):
    """A store operation failed: the message names the URL, what happened and the remedy."""


class MissingObjectError(StoreError):
    """The object is not there."""


class StoredObject(NamedTuple):
    """One line of a listing."""

    key: str
    num_bytes: int
    modified_s: float  # seconds since the epoch


@runtime_checkable
class Store(Protocol):
    """Objects under one URL, addressed by relative keys."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object. Raises MissingObjectError where there is none."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes [start, start + length) of the object."""

    def read_into(self, key: str, start: int, buffers: "Sequence[memoryview]") -> None:
        """Fill the buffers, one after the other, with the bytes from `start` on."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace the object, atomically."""

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Create the object; False where it exists, which is then unchanged. `data` must be the writer's own."""

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """As `put`, with the content of a local file of any size."""

    def list(self, prefix: str = "") -> "list[StoredObject]":
        """The objects whose keys begin with `prefix`, sorted by key; not a snapshot."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""

    def delete_many(self, keys: "Sequence[str]") -> None:
        """As `delete`, in as few requests as the store allows."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    def size(self, key: str) -> int:
        """Bytes of the object. Raises MissingObjectError where there is none."""


def place_of(url: str) -> S3Place | OtherPlace | str:
    """The folder or the bucket and prefix that `url` names. Raises StoreError where it names neither."""
    try:
        return parse_place(url)
    except PlaceError as error:
        raise StoreError(str(error)) from None


def check_key(url: str, key: str) -> str:
    """A key is a relative path without empty, `.` or `..` parts; returns it."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{url}: key {key!r} is not a plain relative path: remove empty, '.' and '..' parts")
    return key
