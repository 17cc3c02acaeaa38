"""A store in a folder: objects are files, renamed into place or created by hard link, synced before they are named."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from nltrain.store.base import MissingObjectError, StoredObject, StoreError, check_key
from nltrain.store.places import shown

TEMPORARY_PREFIX = ".tmp-"
# What file systems without hard links answer to a link (exFAT, SMB, some FUSE).
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """A folder; objects are files below it."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).absolute()
        self.url = str(self.folder)

    def get(self, key: str) -> bytes:
        """The whole file. Raises MissingObjectError where there is none."""
        with self._reading(key) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes [start, start + length) of the file."""
        with self._reading(key) as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise StoreError(
                f"{self._path(key)}: bytes {start}..{start + length} asked for, {len(data)} there: "
                "the file is truncated; restore it or prepare it again"
            )
        return data

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from `start` on."""
        with self._reading(key) as file:
            file.seek(start)
            for buffer in buffers:
                if (got := file.readinto(buffer)) != len(buffer):
                    raise StoreError(
                        f"{self._path(key)}: {len(buffer)} bytes asked for, {got} there: "
                        "the file is truncated; restore it or prepare it again"
                    )

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write a temporary file, sync it and rename it over the old one."""
        with self._written(key, lambda file: file.write(data)) as temporary:
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Create the file by a hard link; False where it exists. Raises StoreError without links in the file system."""
        with self._written(key, lambda file: file.write(data)) as temporary:
            try:
                os.link(temporary, self._path(key))
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                raise StoreError(
                    f"{shown(str(self._path(key)))}: this file system makes no hard links ({error.strerror}), which an "
                    "atomic create needs: choose another folder or an s3:// URL"
                ) from error
            return True

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None:
        """As `put`, with a copy of a local file."""
        with open(path, "rb") as source, self._written(key, lambda file: shutil.copyfileobj(source, file)) as temporary:
            os.replace(temporary, self._path(key))

    def list(self, prefix: str = "") -> "list[StoredObject]":
        """The files whose keys begin with `prefix`, sorted by key; temporary files are left out."""
        found = []
        # Only the folder that the prefix names is walked, not the whole store.
        top = self.folder / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.folder).as_posix()
                if name.startswith(TEMPORARY_PREFIX) or not key.startswith(prefix):
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted since the walk saw it
                    status = path.stat()
                    found.append(StoredObject(key, status.st_size, status.st_mtime))
        return sorted(found)

    def delete(self, key: str) -> None:
        """Remove the file, and the folders above it that are empty now."""
        path = self._path(key)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.folder or not folder.is_relative_to(self.folder):
                break
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already: nothing left to tidy above it either
                break

    def delete_many(self, keys: Sequence[str]) -> None:
        """As `delete`, one after the other."""
        for key in keys:
            self.delete(key)

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        """Bytes of the file. Raises MissingObjectError where there is none."""
        with self._reading(key) as file:
            return os.fstat(file.fileno()).st_size

    def _path(self, key: str) -> Path:
        return self.folder / check_key(self.url, key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[BufferedReader]:
        path = self._path(key)
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed by the caller's with)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingObjectError(f"{shown(str(path))}: no such file: check the path") from error
        except OSError as error:
            raise StoreError(
                f"{shown(str(path))}: cannot be read: {error.strerror}: check its rights and the disk"
            ) from error
        with file:
            yield file

    @contextlib.contextmanager
    def _written(self, key: str, write: Callable[[BinaryIO], Any]) -> Iterator[Path]:
        """A complete, synced temporary file beside the target; removed when still there at the end."""
        target = self._path(key)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            file = self._create(temporary)
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the new name itself survives a power cut
            finally:
                os.close(descriptor)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"{shown(str(target))}: cannot be written: {error.strerror}: check the folder's space and rights"
            ) from error

    def _create(self, path: Path) -> BinaryIO:
        for _ in range(20):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A concurrent delete may just have tidied the empty folder away.
            with contextlib.suppress(FileNotFoundError):
                return open(path, "xb")
        raise StoreError(f"{path.parent}: the folder vanishes as soon as it is made: check who removes it")
