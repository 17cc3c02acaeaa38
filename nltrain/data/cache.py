"""A bounded local folder of shards, shared by the processes of a node.

A file is named by its SHA-256 and renamed into place when it is complete and verified. The least recently used file is
evicted first. One process at a time fetches a shard, under a lock that the kernel frees when the process dies. A file
that is evicted while another process maps it stays readable there. Limits: the folder must be on a local file system
(flock, rename, mmap); the disk space of an evicted file is free when its last map is closed.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nltrain.data.errors import DataError

SUFFIX, PARTIAL_SUFFIX = ".shard", ".part"
ABANDONED_AFTER_S = 3600.0


class ShardCache:
    """The cache folder as one process sees it."""

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int):
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir: {self.folder}: {error.strerror}: name a writable folder") from error

    def map(self, sha256: str) -> mmap.mmap | None:
        """A read-only map of a cached shard, which is marked as just used; None when the cache lacks it."""
        path = self._path(sha256)
        try:
            with open(path, "rb") as file:
                os.utime(path)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None

    def remove(self, sha256: str) -> None:
        """Removes a shard, for instance a damaged one."""
        self._path(sha256).unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, sha256: str) -> Iterator[bool]:
        """Tries to lock the shard for fetching; yields at once whether this thread holds the lock."""
        with self._flock(f"{sha256[:2]}.lock", wait=False) as held:
            yield held

    def add(self, sha256: str, num_bytes: int, parts: Callable[[], Iterable[bytes]], keep: Iterable[str] = ()) -> bool:
        """Stores a shard from its parts; False when they do not have this SHA-256. The caller must hold its lock.

        Shards in `keep` are evicted last. Raises DataError when the disk is full.
        """
        # One name per shard: the next holder of the lock overwrites what a killed process left.
        partial = self._path(sha256).with_suffix(PARTIAL_SUFFIX)
        digest = hashlib.sha256()
        try:
            self._reserve(partial, num_bytes, set(keep))
            with open(partial, "r+b") as file:
                for part in parts():
                    digest.update(part)
                    file.write(part)
            if digest.hexdigest() != sha256:
                return False
            with self._flock("room.lock", wait=True):  # num_bytes then sees it under exactly one name
                os.replace(partial, self._path(sha256))
            return True
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"data.cache_dir: {self.folder}: no space for a shard of {num_bytes} bytes: "
                    "lower data.cache_bytes or name a larger disk"
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)

    def num_bytes(self) -> int:
        """Bytes of all complete and partial shards, at one moment."""
        with self._flock("room.lock", wait=True):
            return sum(size for _, size, _ in self._files())

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}{SUFFIX}"

    @contextlib.contextmanager
    def _flock(self, name: str, wait: bool) -> Iterator[bool]:
        descriptor = os.open(self.folder / "locks" / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
            except BlockingIOError:
                held = False
            yield held
        finally:
            os.close(descriptor)  # frees the lock

    def _files(self) -> list[tuple[float, int, Path]]:
        """(modified, bytes, path) of every shard, oldest first. The caller must hold room.lock."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, PARTIAL_SUFFIX):
                with contextlib.suppress(FileNotFoundError):  # another process removed it as damaged
                    info = path.stat()
                    files.append((info.st_mtime, info.st_size, path))
        return sorted(files)

    def _reserve(self, partial: Path, num_bytes: int, keep: set[str]) -> None:
        """Evicts shards until num_bytes fit, then allocates them, so that two fetches never use the same space."""
        with self._flock("room.lock", wait=True):
            partial.unlink(missing_ok=True)
            files = self._files()
            total = sum(size for _, size, _ in files)
            for modified_s, size, path in sorted(files, key=lambda file: (file[2].stem in keep, file[0])):
                if total + num_bytes <= self.limit_bytes:
                    break
                if path.suffix == PARTIAL_SUFFIX and time.time() - modified_s < ABANDONED_AFTER_S:
                    continue  # another process is writing it
                path.unlink(missing_ok=True)
                total -= size
            with open(partial, "wb") as file:
                file.truncate(num_bytes)
