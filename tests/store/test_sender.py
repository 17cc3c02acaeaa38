"""Large objects are put by a process of its own: the same bytes and errors, and nothing stays when either side ends."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.fault_proxy import FaultProxy
from nltrain.store import StoreError, open_store
from nltrain.store.sender import LARGE_BYTES, NICENESS, Sender, sender_of


def processes() -> list[psutil.Process]:
    """The uploading processes below this one."""
    return [p for p in psutil.Process().children(recursive=True) if any("sender.py" in word for word in p.cmdline())]


def test_only_large_objects_go_through_the_process_and_arrive_as_they_are(bucket: str) -> None:
    inner = open_store(bucket + "/sender")
    store = sender_of(inner, 2)
    assert isinstance(store, Sender)
    assert store.put("small", b"x" * 100) == hashlib.sha256(b"x" * 100).hexdigest()
    assert not processes()
    large = os.urandom(LARGE_BYTES + 7)
    assert store.put("large", large) == hashlib.sha256(large).hexdigest()
    (process,) = processes()
    assert process.nice() == os.nice(0) + NICENESS
    store.put("large", memoryview(large)[::1])
    shorter = store.put("shorter", large[:-3])  # into memory that held more before
    assert shorter == hashlib.sha256(large[:-3]).hexdigest()
    assert [store.inner.get(key) for key in ("small", "large", "shorter")] == [b"x" * 100, large, large[:-3]]
    assert [p.pid for p in processes()] == [process.pid]
    store.close()
    assert not processes()
    store.put("again", large)
    assert inner.get("again") == large
    store.close()


def test_memory_grows_only_for_an_object_that_is_larger_than_all_before(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown, grow = [], os.ftruncate

    def counted(fd: int, length: int) -> None:
        grown.append(length)
        grow(fd, length)

    monkeypatch.setattr(os, "ftruncate", counted)
    store = Sender(open_store(bucket + "/grows"), 1)
    for num_bytes in (LARGE_BYTES, LARGE_BYTES, LARGE_BYTES + 9, LARGE_BYTES + 1):
        store.put("object", os.urandom(num_bytes))
    assert grown == [LARGE_BYTES, LARGE_BYTES + 9]
    store.close()


def test_more_uploads_than_slots_wait_for_one_and_all_arrive(bucket: str) -> None:
    store = Sender(open_store(bucket + "/many"), 3)
    objects = {f"{i}": os.urandom(LARGE_BYTES + 100_000 * i) for i in range(8)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: store.put(*item), objects.items()))
    assert {key: store.inner.get(key) for key in objects} == objects
    store.close()


def test_an_error_is_the_one_that_the_store_itself_gives(bucket: str) -> None:
    inner = open_store("s3://no-such-bucket-here/x")
    store = Sender(inner, 1)
    with pytest.raises(StoreError) as direct:
        inner.put("k", b"1" * LARGE_BYTES)
    with pytest.raises(StoreError) as sent:
        store.put("k", b"1" * LARGE_BYTES)
    assert str(sent.value) == str(direct.value)
    store.close()


def test_a_process_that_dies_fails_its_upload_and_the_next_one_gets_another(
    s3: EmbeddedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(LARGE_BYTES)
    with FaultProxy(s3.endpoint_url, probability=0, kinds=["stall"], stall_s=15.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        store = Sender(open_store(bucket + "/dies"), 1)
        store.put("first", data)
        (process,) = processes()
        proxy.probability = 1.0
        with ThreadPoolExecutor(2) as pool:
            uploads = [pool.submit(store.put, key, data) for key in ("second", "waits")]
            while not proxy.num_faults:
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)
            proxy.probability = 0.0
            errors = [upload.exception(20) for upload in uploads]
        assert any("put failed: the process that uploads ended with exit code -9" in str(error) for error in errors)
        store.put("third", data)
        assert store.inner.get("third") == data
        store.close()


OWNER = f"""
import os, sys, time
from nltrain.store import open_store
from nltrain.store.sender import Sender
store = Sender(open_store(sys.argv[1]), 1)
store.put("large", b"x" * {LARGE_BYTES})
print(store._process.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_owner_leaves_no_process(bucket: str) -> None:
    command = [sys.executable, "-c", OWNER, bucket + "/owner"]
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert owner.stdout is not None
    process = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    process.wait(20)
