"""S3 and a local folder behave alike; faults are survived, mistakes are explained in one line and quickly."""

import http.client
import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nltrain.checkpoint.catalog import claim_attempt
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from nltrain.store import MissingObjectError, S3Store, Store, StoreError, open_store
from nltrain.store.probe import check_atomic_create


@pytest.fixture(params=["s3", "folder", "file_url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("bucket") + "/some/prefix")
    return open_store(f"file://{tmp_path}/store" if request.param == "file_url" else str(tmp_path / "store"))


def test_what_is_put_is_got_listed_sized_and_deleted(store: Store, tmp_path: Path) -> None:
    store.put("a/one", b"12345")
    store.put("a/one", b"123456")
    store.put("b", memoryview(b"xy"))
    (tmp_path / "file").write_bytes(b"file")
    store.put_file("a/two", tmp_path / "file")
    assert store.get("a/one") == b"123456"
    assert store.get_range("a/one", 2, 3) == b"345"
    assert store.get_range("a/one", 2, 0) == b""
    head, tail = bytearray(2), bytearray(3)
    store.read_into("a/one", 1, [memoryview(head), memoryview(bytearray()), memoryview(tail)])
    assert (head, tail) == (b"23", b"456")
    store.read_into("a/one", 6, [])
    assert store.get("a/two") == b"file"
    assert [(found.key, found.num_bytes) for found in store.list()] == [("a/one", 6), ("a/two", 4), ("b", 2)]
    assert [found.key for found in store.list("a/o")] == ["a/one"]
    assert all(abs(found.modified_s - time.time()) < 3600 for found in store.list())
    assert store.size("b") == 2
    assert store.exists("b") and not store.exists("c") and not store.exists("a")
    store.delete("b")
    store.delete("b")
    assert not store.exists("b")
    assert store.list("b") == []


def test_many_are_deleted_at_once_and_others_stay(store: Store) -> None:
    for number in range(5):
        store.put(f"many/{number}", b"x")
    store.delete_many([f"many/{number}" for number in range(4)])
    store.delete_many(["many/0", "many/never"])
    store.delete_many([])
    assert [found.key for found in store.list()] == ["many/4"]


def test_deleting_more_than_one_request_takes_is_cut_into_requests(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nltrain.store.s3.DELETE_BATCH", 2)
    store = open_store(bucket + "/batches")
    asked = []
    call = S3Store._delete_batch
    monkeypatch.setattr(
        S3Store, "_delete_batch", lambda self, keys, *more: asked.append(keys) or call(self, keys, *more)
    )
    for number in range(5):
        store.put(f"{number}", b"x")
    store.delete_many([f"{number}" for number in range(5)])
    assert asked == [["0", "1"], ["2", "3"], ["4"]]
    assert store.list() == []


@pytest.mark.parametrize(("code", "tries"), [("SlowDown", 3), ("AccessDenied", 1)])
def test_an_object_refused_within_a_batch_is_an_error_or_tried_again(code: str, tries: int) -> None:
    class Client:
        calls = 0
        meta = type("Meta", (), {"region_name": "us-east-1"})

        def delete_objects(self, **_: object) -> dict:
            self.calls += 1
            return {"Errors": [{"Key": "a", "Code": code, "Message": "no"}]}

    store = S3Store("s3://b", attempts=3, timeout_s=1, backoff_s=0.001)
    store._client = Client()
    with pytest.raises(StoreError, match=code):
        store.delete_many(["a"])
    assert store._client.calls == tries


@pytest.mark.parametrize("trailer", [False, True])
def test_an_upload_takes_a_turn_of_the_interpreter_per_megabyte_not_per_16_kib(
    bucket: str, monkeypatch: pytest.MonkeyPatch, trailer: bool
) -> None:
    """Over HTTPS the checksum follows the body, which botocore wraps for it: one more reader in between."""
    if trailer:
        monkeypatch.setattr("botocore.httpchecksum.urlparse", lambda url: urlsplit(url)._replace(scheme="https"))
    turns = []
    send = http.client.HTTPConnection.send
    monkeypatch.setattr(
        http.client.HTTPConnection, "send", lambda self, data: turns.append(len(data)) or send(self, data)
    )
    store, data = open_store(bucket + "/blocks"), os.urandom(16 << 20)
    store.put("large", memoryview(data))
    assert sum(turns) >= len(data)
    assert len(turns) <= 16 + 8
    monkeypatch.undo()
    assert store.get("large") == data


def test_put_if_absent_creates_once(store: Store) -> None:
    assert store.put_if_absent("claim", b"first")
    assert not store.put_if_absent("claim", b"second")
    assert store.get("claim") == b"first"


def test_a_store_that_creates_once_passes_the_probe_and_keeps_nothing_of_it(store: Store) -> None:
    check_atomic_create(store, "run/attempts")
    assert store.list() == []


@pytest.mark.parametrize(
    ("conditional_puts", "says"),
    [
        ("refused", r"does not know an atomic create \(PUT with If-None-Match: \*\) \(NotImplemented\): use AWS S3"),
        ("ignored", r"ignores If-None-Match: two creates of one object both succeeded.*use AWS S3"),
    ],
)
def test_a_store_without_conditional_puts_is_refused_at_once_when_a_run_begins(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch, conditional_puts: str, says: str
) -> None:
    with FaultProxy(s3.endpoint_url, probability=0) as proxy:
        proxy.conditional_puts = conditional_puts
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        store = open_store(bucket)
        with pytest.raises(StoreError, match=says):
            claim_attempt(store, "run")
        assert store.retries == 0  # type: ignore[attr-defined]
        assert store.list() == []  # no attempt was begun and nothing is left
        proxy.conditional_puts = "forwarded"
        assert claim_attempt(store, "run") == 1


def test_a_folder_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what exFAT and some network shares answer

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match=r"run/attempts/probe-.*makes no hard links .*choose another folder"):
        check_atomic_create(open_store(str(tmp_path)), "run/attempts")
    assert open_store(str(tmp_path)).list() == []


def test_a_missing_object_and_a_short_range_are_named(store: Store) -> None:
    with pytest.raises(MissingObjectError, match="nothing/here"):
        store.get("nothing/here")
    with pytest.raises(MissingObjectError, match="nothing"):
        store.size("nothing")
    store.put("short", b"abc")
    with pytest.raises(StoreError, match="short"):
        open_store(store.url, attempts=2, backoff_s=0.01).get_range("short", 1, 10)
    with pytest.raises(StoreError, match="short"):
        open_store(store.url, attempts=2, backoff_s=0.01).read_into("short", 1, [memoryview(bytearray(10))])


def test_a_key_cannot_leave_a_folder(tmp_path: Path) -> None:
    for key in ("../x", "/etc/passwd", "a//b", "", "a/./b"):
        with pytest.raises(StoreError, match="plain relative path"):
            open_store(str(tmp_path)).put(key, b"")


ODD_KEYS = ["crawl#2", "a?b=c&d", "a%20b", "a b", "a+b", "a//b", "a/", "/a", "./a", "a/../b", "é\t;,'\"", "\U0001f600"]


@pytest.mark.parametrize("prefix", ["", "/crawl#2", "/x//", "//x", "/a b?"])
def test_a_key_of_s3_means_itself_whatever_its_characters(bucket: str, prefix: str) -> None:
    plain = open_store(bucket)
    for name in ("crawl", "crawl#2", "x", "a b"):
        plain.put(f"{name}/mine", b"another's")
    store = open_store(bucket + prefix)
    for key in ODD_KEYS:
        store.put(key, key.encode())
        assert not store.put_if_absent(key, b"other")
    inside = prefix.removeprefix("/").removesuffix("/")
    for key in ODD_KEYS:
        assert store.get(key) == plain.get(f"{inside}/{key}" if inside else key) == key.encode()
    assert {found.key for found in store.list()} >= set(ODD_KEYS)
    assert plain.get("crawl/mine") == plain.get("x/mine") == b"another's"
    with pytest.raises(StoreError, match="key is empty"):
        store.get("")


def test_an_object_that_shows_an_empty_folder_is_no_object_of_it(bucket: str) -> None:
    open_store(bucket).put("folder/", b"")
    assert open_store(f"{bucket}/folder/").list() == []


def test_readers_of_a_folder_see_whole_objects_only(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    versions = [bytes([n]) * 200_000 for n in range(4)]
    store.put("x/y", versions[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                store.put("x/y", version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(store.get("x/y") in versions for _ in range(200))
    finally:
        stop.set()
        writer.join()
    assert [found.key for found in store.list()] == ["x/y"]


def test_an_object_larger_than_one_part_survives(bucket: str) -> None:
    store = open_store(bucket)
    data = os.urandom(1 << 20) * 70
    store.put("large", data)
    assert store.get("large") == data


def test_faults_of_the_network_are_survived(s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3.endpoint_url, probability=0.3, stall_s=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        store = open_store(bucket, attempts=15, timeout_s=0.3, backoff_s=0.01)
        for number in range(12):
            data = os.urandom(5000)
            store.put(f"put/{number}", data)
            assert store.get(f"put/{number}") == data
            assert store.get_range(f"put/{number}", 100, 50) == data[100:150]
            pieces = [bytearray(100), bytearray(4000)]
            store.read_into(f"put/{number}", 700, [memoryview(piece) for piece in pieces])
            assert b"".join(pieces) == data[700:4800]
            assert store.put_if_absent(f"claim/{number}", data)
            assert not store.put_if_absent(f"claim/{number}", b"other")
            store.delete(f"put/{number}")
        assert len(store.list("claim/")) == 12 and store.list("put/") == []
        assert proxy.num_faults > 15


def test_a_network_that_stays_broken_ends_in_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started_s = time.monotonic()
    with pytest.raises(StoreError, match=rf"{bucket}/key: get failed 3 times.*AWS_ENDPOINT_URL") as error:
        open_store(bucket, attempts=3, backoff_s=0.01).get("key")
    assert "\n" not in str(error.value)
    assert time.monotonic() - started_s < 10


def test_missing_credentials_are_named_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    started_s = time.monotonic()
    with pytest.raises(StoreError, match=r"no AWS credentials found: set AWS_ACCESS_KEY_ID"):
        open_store(bucket).get("key")
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((400, "AuthorizationHeaderMalformed", {}), "not in region 'us-east-1'.*set AWS_REGION"),
        ((301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"}), "set AWS_REGION=eu-west-1"),
        ((403, "AccessDenied", {}), "access refused .AccessDenied.: check the credentials"),
        ((403, "ExpiredToken", {}), "access refused .ExpiredToken."),
    ],
)
def test_a_refusal_is_explained_and_not_retried(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str, dict[str, str]], says: str
) -> None:
    with FaultProxy(s3.endpoint_url, probability=0) as proxy:
        proxy.refusal = refusal
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        store = open_store(bucket)
        with pytest.raises(StoreError, match=says):
            store.get("key")
        assert store.retries == 0  # type: ignore[attr-defined]


def test_a_missing_bucket_is_named(s3: EmbeddedS3) -> None:
    with s3.in_environment(), pytest.raises(StoreError, match=r"s3://no-such-bucket/x/key.*does not exist"):
        open_store("s3://no-such-bucket/x").get("key")


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "s3://", "s3:/bucket/x", "file://folder/x"])
def test_a_url_that_cannot_be_a_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_the_embedded_server_leaves_nothing_behind() -> None:
    with EmbeddedS3("bucket") as server:
        folder, pid = Path(server.folder), server.pid
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
