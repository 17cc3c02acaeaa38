"""One small seam over S3 and a local folder; the only file that imports boto3, hence its length.

Guarantees: `put` and `put_file` are atomic (a reader sees the old object, the new one or none), `put_if_absent` is an
atomic create, every read returns exactly the bytes asked for, and each failure is one `StoreError` line with the URL
and what to do. Transient failures (5xx, SlowDown, resets, stalls, short bodies) are retried with exponential backoff
and full jitter; everything else fails at once. A key of S3 means itself, whatever its characters; below a folder keys
are plain relative paths. Limits: listing is not a snapshot.
"""

import contextlib
import errno
import io
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from nltrain.places import PlaceError, S3Place, join_url, parse_place, shown

T = TypeVar("T")

_sessions: dict[tuple, Any] = {}
_sessions_lock = threading.Lock()

DEFAULT_ATTEMPTS = 7
DEFAULT_TIMEOUT_S = 20.0
DEFAULT_BACKOFF_S = 0.2
MAX_BACKOFF_S = 8.0
CONNECT_TIMEOUT_S = 5.0
NOT_IMPLEMENTED = 501
NEEDED_STORE = "use AWS S3, a store with conditional writes (MinIO, Ceph and others have them) or a shared folder"
# One PUT may carry 5 GiB; parts also go out on several connections at once.
MULTIPART_THRESHOLD_BYTES = 64 << 20
# What one read copies at a time: small enough for a processor's cache.
COPY_BYTES = 1 << 20
# What one turn of the interpreter sends.
UPLOAD_BLOCK_BYTES = 1 << 20
TEMPORARY_PREFIX = ".tmp-"
DELETE_BATCH = 1000  # the most that one DeleteObjects takes
# What file systems without hard links answer to a link (exFAT, SMB, some FUSE).
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class StoreError(Exception):
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

    def get(self, key: str) -> bytes: ...

    def get_range(self, key: str, start: int, length: int) -> bytes: ...

    def read_into(self, key: str, start: int, buffers: "Sequence[memoryview]") -> None: ...

    def put(self, key: str, data: bytes | memoryview) -> None: ...

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool: ...

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None: ...

    def list(self, prefix: str = "") -> "list[StoredObject]": ...

    def delete(self, key: str) -> None: ...

    def delete_many(self, keys: "Sequence[str]") -> None: ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int: ...


def open_store(
    url: str,
    *,
    attempts: int = DEFAULT_ATTEMPTS,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    backoff_s: float = DEFAULT_BACKOFF_S,
) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a local folder. Nothing is contacted or created yet.

    attempts, timeout_s (silence on the connection) and backoff_s (first wait, doubled each time) apply to S3.
    S3 endpoint, region and credentials come from the usual AWS chain (AWS_ENDPOINT_URL, AWS_REGION, profiles, ...).
    """
    place = _parse(url)
    if isinstance(place, S3Place):
        return S3Store(url, attempts=attempts, timeout_s=timeout_s, backoff_s=backoff_s)
    return LocalStore(place)


def _parse(url: str) -> S3Place | str:
    try:
        return parse_place(url)
    except PlaceError as error:
        raise StoreError(str(error)) from None


def check_key(url: str, key: str) -> str:
    """A key is a relative path without empty, `.` or `..` parts; returns it."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{url}: key {key!r} is not a plain relative path: remove empty, '.' and '..' parts")
    return key


class LocalStore:
    """A folder; objects are files below it."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).absolute()
        self.url = str(self.folder)

    def get(self, key: str) -> bytes:
        with self._reading(key) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
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
        with self._written(key, lambda file: file.write(data)) as temporary:
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
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
        with open(path, "rb") as source, self._written(key, lambda file: shutil.copyfileobj(source, file)) as temporary:
            os.replace(temporary, self._path(key))

    def list(self, prefix: str = "") -> "list[StoredObject]":
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
        for key in keys:
            self.delete(key)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        with self._reading(key) as file:
            return os.fstat(file.fileno()).st_size

    def _path(self, key: str) -> Path:
        return self.folder / check_key(self.url, key)

    @contextlib.contextmanager
    def _reading(self, key: str):
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
    def _written(self, key: str, write: Callable[[Any], Any]):
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

    def _create(self, path: Path):
        for _ in range(20):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A concurrent delete may just have tidied the empty folder away.
            with contextlib.suppress(FileNotFoundError):
                return open(path, "xb")
        raise StoreError(f"{path.parent}: the folder vanishes as soon as it is made: check who removes it")


class S3Store:
    """Objects under s3://bucket/prefix. Thread-safe; make a new one after a fork."""

    def __init__(self, url: str, *, attempts: int, timeout_s: float, backoff_s: float):
        place = _parse(url)
        if not isinstance(place, S3Place):
            raise StoreError(f"{url}: not an S3 URL: give s3://bucket/prefix")
        self.bucket, self.prefix = place
        # A slash that belongs to the prefix is followed by the one that ends a folder's URL.
        tail = "/" if self.prefix.endswith("/") else ""
        self.url = f"s3://{self.bucket}" + (f"/{self.prefix}{tail}" if self.prefix else "")
        self.attempts, self.timeout_s, self.backoff_s = attempts, timeout_s, backoff_s
        self.retries = 0  # transient failures seen so far, for tests and metrics
        self._lock = threading.Lock()
        self._client: Any = None

    def get(self, key: str) -> bytes:
        def read(client: Any, ambiguous: bool) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=self._key(key))
            return _body(answer, answer["ContentLength"])

        return self._call("get", key, read)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""

        def read(client: Any, ambiguous: bool) -> bytes:
            byte_range = f"bytes={start}-{start + length - 1}"
            return _body(client.get_object(Bucket=self.bucket, Key=self._key(key), Range=byte_range), length)

        return self._call("get_range", key, read)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from `start` on; one request for all of them."""
        length = sum(len(buffer) for buffer in buffers)
        if length == 0:
            return

        def read(client: Any, ambiguous: bool) -> None:
            byte_range = f"bytes={start}-{start + length - 1}"
            answer = client.get_object(Bucket=self.bucket, Key=self._key(key), Range=byte_range)
            with contextlib.closing(answer["Body"]) as body:
                for buffer in buffers:
                    _fill(body, buffer)
                if body.readinto(bytearray(1)):  # botocore checks its checksum when it sees the end
                    raise ShortBodyError(f"more than {length} bytes arrived")

        self._call("read_into", key, read)

    def put(self, key: str, data: bytes | memoryview) -> None:
        def write(client: Any, ambiguous: bool) -> None:
            if len(data) > MULTIPART_THRESHOLD_BYTES:
                client.upload_fileobj(_View(data), self.bucket, self._key(key))
            else:
                client.put_object(Bucket=self.bucket, Key=self._key(key), Body=_View(data))

        self._call("put", key, write)

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        """Atomic create. After a lost answer the object is compared with `data`, so `data` must be the writer's own."""
        from botocore.exceptions import ClientError

        body = bytes(data)

        def create(client: Any, ambiguous: bool) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=self._key(key), Body=body, IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                return ambiguous and self.get(key) == body
            return True

        return self._call("put_if_absent", key, create)

    def put_file(self, key: str, path: str | os.PathLike[str]) -> None:
        self._call("put_file", key, lambda client, _: client.upload_file(os.fspath(path), self.bucket, self._key(key)))

    def list(self, prefix: str = "") -> "list[StoredObject]":
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        skip = len(self.prefix) + 1 if self.prefix else 0

        def read(client: Any, ambiguous: bool) -> list[StoredObject]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full)
            return [
                StoredObject(item["Key"][skip:], item["Size"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", [])
                if len(item["Key"]) > skip  # not the object that consoles make to show an empty folder
            ]

        return self._call("list", prefix, read)

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda client, _: client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def delete_many(self, keys: Sequence[str]) -> None:
        """As `delete`, a thousand in one request."""

        for first in range(0, len(keys), DELETE_BATCH):
            batch = keys[first : first + DELETE_BATCH]
            self._call("delete", batch[0], partial(self._delete_batch, batch))

    def _delete_batch(self, keys: Sequence[str], client: Any, ambiguous: bool) -> None:
        listed = {"Objects": [{"Key": self._key(key)} for key in keys], "Quiet": True}
        if refused := client.delete_objects(Bucket=self.bucket, Delete=listed).get("Errors", []):
            raise _refused_delete(refused[0])

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingObjectError:
            return False
        return True

    def size(self, key: str) -> int:
        answer = self._call("size", key, lambda client, _: client.head_object(Bucket=self.bucket, Key=self._key(key)))
        return answer["ContentLength"]

    def create_bucket(self) -> None:
        """Makes the bucket; for embedded servers and set-up scripts."""
        self._call("create_bucket", "", lambda client, _: client.create_bucket(Bucket=self.bucket))

    def _key(self, key: str) -> str:
        if not key:
            raise StoreError(f"{self.url}: an object's key is empty: name an object")
        return f"{self.prefix}/{key}" if self.prefix else key

    def _connect(self) -> Any:
        with self._lock:  # boto3 sessions are not thread-safe, clients are
            if self._client is None:
                self._client = _new_client(self.url, self.timeout_s)
            return self._client

    def _call(self, verb: str, key: str, operation: Callable[[Any, bool], T]) -> T:
        """operation(client, ambiguous): ambiguous when an earlier try may have taken effect unseen."""
        url = shown(join_url(self.url, key))
        client = self._connect()
        for attempt in range(1, self.attempts + 1):
            try:
                return operation(client, attempt > 1)
            except StoreError:
                raise
            except Exception as error:
                if not _is_transient(error):
                    raise _explain(url, verb, error, client.meta.region_name) from error
                if attempt == self.attempts:
                    raise StoreError(
                        f"{url}: {verb} failed {attempt} times, last: {_one_line(error)}: "
                        "check AWS_ENDPOINT_URL and the network, then start again"
                    ) from error
                with self._lock:
                    self.retries += 1
                # Full jitter: ranks that failed together do not come back together.
                time.sleep(random.uniform(0, min(MAX_BACKOFF_S, self.backoff_s * 2 ** (attempt - 1))))
        raise StoreError(f"{url}: attempts = {self.attempts}: at least 1 is needed")


class _View(io.RawIOBase):
    """A file over memory that is not copied: botocore takes no memoryview."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._position = memoryview(data), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        return self._position

    def read(self, size: int | None = -1) -> Any:
        """A view of the next bytes: whoever sends them copies them, and nobody else."""
        stop = len(self._data) if size is None or size < 0 else self._position + size
        part = self._data[self._position : stop]
        self._position += len(part)
        return part

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


class _Blocks:
    """A request's body that is read in large blocks, whatever its reader asks for.

    urllib3 asks for 16 KiB at a time: 4,096 turns of the interpreter for a file of 64 MiB, each of which a training
    loop on another thread waits for; with a checksum in the trailer each also copies the rest of a megabyte.
    """

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int = -1) -> Any:
        return self._body.read(max(size, UPLOAD_BLOCK_BYTES) if size >= 0 else size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)  # seek and tell, where the body has them


def _send_in_blocks(request: Any, **_: Any) -> None:
    """A handler of botocore's event before-send."""
    if hasattr(request.body, "read"):
        request.body = _Blocks(request.body)


class ShortBodyError(Exception):
    """Fewer or more bytes arrived than were asked for."""


def _body(answer: Any, length: int) -> bytes:
    with contextlib.closing(answer["Body"]) as body:
        data = body.read()
    if len(data) != length:
        raise ShortBodyError(f"{len(data)} of {length} bytes arrived")
    return data


def _fill(body: Any, buffer: memoryview) -> None:
    for first in range(0, len(buffer), COPY_BYTES):
        window = buffer[first : first + COPY_BYTES]
        while window:
            if not (got := body.readinto(window)):
                raise ShortBodyError(f"{len(window)} bytes did not arrive")
            window = window[got:]


def _session() -> Any:
    """The session of this environment. It holds the parsed S3 API, which costs a tenth of a second to make."""
    import boto3
    import botocore.session

    names = sorted(name for name in os.environ if name.startswith("AWS_") or name == "HOME")
    environment = tuple((name, os.environ[name]) for name in names)
    if environment not in _sessions:
        core = botocore.session.Session()
        # Outside EC2 the metadata address swallows packets: short tries, not minutes; on it one answer may be slow.
        core.set_config_variable("metadata_service_timeout", 1)
        core.set_config_variable("metadata_service_num_attempts", 5)
        _sessions[environment] = boto3.session.Session(botocore_session=core)
    return _sessions[environment]


def _new_client(url: str, timeout_s: float) -> Any:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=timeout_s,
        max_pool_connections=32,
        retries={"total_max_attempts": 1, "mode": "standard"},  # retried here, bodies included
    )
    try:
        with _sessions_lock:  # sessions are not thread-safe
            session = _session()
            region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
            client = session.client("s3", region_name=region, config=config)
            client.meta.events.register("before-send.s3", _send_in_blocks)
            return client
    except (BotoCoreError, ValueError) as error:
        raise StoreError(
            f"{url}: S3 client: {_one_line(error)}: check the AWS_* variables and ~/.aws/config"
        ) from error


def _refused_delete(entry: dict[str, Any]) -> Exception:
    """What an answer with status 200 says of one object, as the error it would have been alone."""
    from botocore.exceptions import ClientError

    code = entry.get("Code", "")
    status = {"InternalError": 500, "SlowDown": 503, "ServiceUnavailable": 503}.get(code, 403)
    detail = {"Code": code, "Message": f"{entry.get('Key')}: {entry.get('Message', '')}"}
    return ClientError({"Error": detail, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_transient(error: Exception) -> bool:
    from boto3.exceptions import S3UploadFailedError
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        names = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "RequestTimeTooSkewed"}
        return (status >= 500 and status != NOT_IMPLEMENTED) or status == 429 or code in names
    if isinstance(error, S3UploadFailedError):
        return isinstance(error.__context__, Exception) and _is_transient(error.__context__)
    kinds = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
    )
    # ResponseParserError: an XML answer cut in the middle.
    return isinstance(error, (*kinds, ResponseParserError, HTTPError, ShortBodyError, ConnectionError, TimeoutError))


def _explain(url: str, verb: str, error: Exception, region: str) -> StoreError:
    from boto3.exceptions import S3UploadFailedError
    from botocore import exceptions

    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, Exception):
        error = error.__context__
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        return StoreError(f"{url}: {verb}: no AWS credentials found: {remedy}")
    if not isinstance(error, exceptions.ClientError):
        return StoreError(f"{url}: {verb}: {_one_line(error)}: check the URL and the AWS_* variables")
    code = error.response.get("Error", {}).get("Code", "")
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == NOT_IMPLEMENTED:
        what = "an atomic create (PUT with If-None-Match: *)" if verb == "put_if_absent" else "this request"
        return StoreError(f"{url}: {verb}: the store at this endpoint does not know {what} ({code}): {NEEDED_STORE}")
    if code == "NoSuchBucket":
        return StoreError(f"{url}: {verb}: the bucket does not exist: create it or correct the URL")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingObjectError(f"{url}: {verb}: no such object: check the URL")
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        named = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
        wanted = f"AWS_REGION={named}" if named else "AWS_REGION to the bucket's region"
        return StoreError(f"{url}: {verb}: the bucket is not in region {region!r} ({code}): set {wanted}")
    if code in ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return StoreError(f"{url}: {verb}: access refused ({code}): check the credentials and the bucket's policy")
    return StoreError(f"{url}: {verb}: {_one_line(error)}: check the URL and the AWS_* variables")
