"""A store in S3 or behind its protocol; the only file of the product that imports boto3 and botocore.

Transient failures (5xx, SlowDown, resets, stalls, short bodies) are retried with exponential backoff and full jitter;
everything else fails at once. A key of S3 means itself, whatever its characters.
"""

import contextlib
import io
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from nltrain.store.base import NEEDED_STORE, MissingObjectError, StoredObject, StoreError, place_of
from nltrain.store.places import S3Place, join_url, shown

T = TypeVar("T")

_sessions: dict[tuple, Any] = {}
_sessions_lock = threading.Lock()

MAX_BACKOFF_S = 8.0
CONNECT_TIMEOUT_S = 5.0
# One PUT may carry 5 GiB; parts also go out on several connections at once.
MULTIPART_THRESHOLD_BYTES = 64 << 20
# What one read copies at a time: small enough for a processor's cache.
COPY_BYTES = 1 << 20
# What one turn of the interpreter sends.
UPLOAD_BLOCK_BYTES = 1 << 20
NOT_IMPLEMENTED = 501
DELETE_BATCH = 1000  # the most that one DeleteObjects takes


class S3Store:
    """Objects under s3://bucket/prefix. Thread-safe; make a new one after a fork."""

    def __init__(self, url: str, *, attempts: int, timeout_s: float, backoff_s: float):
        place = place_of(url)
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
        """The whole object. Raises MissingObjectError where there is none."""

        def read(client: Any, ambiguous: bool) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=self._key(key))
            return _body(answer, answer["ContentLength"])

        return self._call("get", key, read)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly the bytes [start, start + length) of the object."""
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
        """Create or replace the object: one request, or several parts above MULTIPART_THRESHOLD_BYTES."""

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
        """As `put`, with the content of a local file of any size."""
        self._call("put_file", key, lambda client, _: client.upload_file(os.fspath(path), self.bucket, self._key(key)))

    def list(self, prefix: str = "") -> "list[StoredObject]":
        """The objects whose keys begin with `prefix`, sorted by key; not a snapshot."""
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
        """Remove the object; nothing happens where there is none."""
        self._call("delete", key, lambda client, _: client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def delete_many(self, keys: Sequence[str]) -> None:
        """As `delete`, a thousand in one request."""

        for first in range(0, len(keys), DELETE_BATCH):
            batch = keys[first : first + DELETE_BATCH]
            self._call("delete", batch[0], partial(self._delete_batch, batch))

    def _delete_batch(self, keys: Sequence[str], client: Any, ambiguous: bool) -> None:
        listed = {"Objects": [{"Key": self._key(key)} for key in keys], "Quiet": True}
        if refused := client.delete_objects(Bucket=self.bucket, Delete=listed).get("Errors", []):
            raise refused_delete(refused[0])

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.size(key)
        except MissingObjectError:
            return False
        return True

    def size(self, key: str) -> int:
        """Bytes of the object. Raises MissingObjectError where there is none."""
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
                cause = _cause(error)
                if not is_transient(cause):
                    raise explain(url, verb, cause, client.meta.region_name) from error
                if attempt == self.attempts:
                    raise StoreError(
                        f"{url}: {verb} failed {attempt} times, last: {one_line(error)}: "
                        "check AWS_ENDPOINT_URL and the network, then start again"
                    ) from error
                with self._lock:
                    self.retries += 1
                # Full jitter: ranks that failed together do not come back together.
                time.sleep(random.uniform(0, min(MAX_BACKOFF_S, self.backoff_s * 2 ** (attempt - 1))))
        raise StoreError(f"{url}: attempts = {self.attempts}: at least 1 is needed")


def _cause(error: Exception) -> Exception:
    """What an upload in parts met, which boto3 wraps; any other error as it is."""
    from boto3.exceptions import S3UploadFailedError

    inner = error.__context__
    return inner if isinstance(error, S3UploadFailedError) and isinstance(inner, Exception) else error


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
        raise StoreError(f"{url}: S3 client: {one_line(error)}: check the AWS_* variables and ~/.aws/config") from error


# ---- what botocore's errors mean: which are worth another try, and one line with the remedy for the others


class ShortBodyError(Exception):
    """Fewer or more bytes arrived than were asked for."""


def refused_delete(entry: dict[str, Any]) -> Exception:
    """What an answer with status 200 says of one object, as the error it would have been alone."""
    from botocore.exceptions import ClientError

    code = entry.get("Code", "")
    status = {"InternalError": 500, "SlowDown": 503, "ServiceUnavailable": 503}.get(code, 403)
    detail = {"Code": code, "Message": f"{entry.get('Key')}: {entry.get('Message', '')}"}
    return ClientError({"Error": detail, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")


def one_line(error: BaseException) -> str:
    """The error's type and text without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_transient(error: Exception) -> bool:
    """Whether another try may succeed."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        names = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "RequestTimeTooSkewed"}
        return (status >= 500 and status != NOT_IMPLEMENTED) or status == 429 or code in names
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


def explain(url: str, verb: str, error: Exception, region: str) -> StoreError:
    """A StoreError with the URL, what failed and the remedy, for an error that another try does not cure."""
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        return StoreError(f"{url}: {verb}: no AWS credentials found: {remedy}")
    if not isinstance(error, exceptions.ClientError):
        return StoreError(f"{url}: {verb}: {one_line(error)}: check the URL and the AWS_* variables")
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
    return StoreError(f"{url}: {verb}: {one_line(error)}: check the URL and the AWS_* variables")
