"""A bounded local folder of shards, shared by the processes of a node.

Files are named by their SHA-256, appear by rename when complete and verified, and are dropped least recently used
first. Each shard is fetched by one process at a time, under a lock that the kernel frees when its holder dies. A file
dropped while another process still maps it stays readable there. Limits: the folder must be on a local file system
(flock, rename, mmap); disk space of dropped files returns when the last map is closed.
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
        """A read-only map of a cached shard, marked as just used; None when it is not there."""
        path = self._path(sha256)
        try:
            with open(path, "rb") as file:
                os.utime(path)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None

    def drop(self, sha256: str) -> None:
        """Forgets a shard, for instance a damaged one."""
        self._path(sha256).unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, sha256: str) -> Iterator[bool]:
        """Whether this thread got the right to fetch the shard; does not wait."""
        with self._flock(f"{sha256[:2]}.lock", wait=False) as held:
            yield held

    def add(self, sha256: str, num_bytes: int, parts: Callable[[], Iterable[bytes]], keep: Iterable[str] = ()) -> bool:
        """Stores a shard from its parts; the caller holds its lock. False when the parts do not have this SHA-256.

        Shards in `keep` are dropped last.
        """
        # One name per shard: what a killed process left is overwritten by the next that holds the lock.
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
            with self._flock("room.lock", wait=True):  # whoever counts sees it under one of its two names
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
        """(modified, bytes, path) of every shard. The caller holds the room: shards are added and renamed under it."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, PARTIAL_SUFFIX):
                with contextlib.suppress(FileNotFoundError):  # a damaged one, dropped by another process meanwhile
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
        return sorted(files)

    def _reserve(self, partial: Path, num_bytes: int, keep: set[str]) -> None:
        """Makes room and takes it, so that shards fetched at the same time do not share it."""
        with self._flock("room.lock", wait=True):
            partial.unlink(missing_ok=True)
            files = self._files()
            total = sum(size for _, size, _ in files)
            # Those that this process needs soon go last.
            for modified_s, size, path in sorted(files, key=lambda file: (file[2].stem in keep, file[0])):
                if total + num_bytes <= self.limit_bytes:
                    break
                if path.suffix == PARTIAL_SUFFIX and time.time() - modified_s < ABANDONED_AFTER_S:
                    continue  # another process is writing it
                path.unlink(missing_ok=True)
                total -= size
            with open(partial, "wb") as file:
                file.truncate(num_bytes)
