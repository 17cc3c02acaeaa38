"""Uploads from a process of their own, so that a training loop does not wait for the interpreter.

An upload takes the interpreter's lock once per block, over TLS once per 16 KiB; a loop that launches small operations
waits for each of them. `Sender` writes an object's bytes into memory that it shares with one process, in a single
call that holds no lock, and that process hashes and puts them. Every call of the system gives the lock up and takes it
again, so an object makes four: is the process there, the copy, the announcement, the answer. A thread that has just
taken the lock must not wait for a core meanwhile, so the process yields to everything else (`NICENESS`). What takes few
blocks is put directly. Each of `num_slots` uploads at a time has memory of its own, as large as the largest object it
carried. The process starts with the first large object and ends with its owner, however that ends. Started as a file;
it imports neither torch nor ray.

    python sender.py '{"url": "s3://bucket/runs", "slots": [[5, 6], [7, 8]], ...}'
"""

import contextlib
import hashlib
import json
import mmap
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a file on its own: its package is found, and not the modules that lie beside it
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from nltrain.store.base import Store, StoreError
from nltrain.store.s3 import S3Store

LARGE_BYTES = 4 << 20
CLOSE_TIMEOUT_S = 10.0
NICENESS = 10
OPTIONS = ("attempts", "timeout_s", "backoff_s")  # of an S3Store


class _Slot:
    """Memory of one upload at a time, and the line on which it is announced and answered."""

    def __init__(self) -> None:
        self.own, self.other = socket.socketpair()
        self.lines = self.own.makefile("rb")
        if hasattr(os, "memfd_create"):
            self.memory_fd = os.memfd_create("nltrain-upload")
        else:
            with tempfile.TemporaryFile() as file:
                self.memory_fd = os.dup(file.fileno())
        self.num_bytes = 0  # of the memory, so that no upload asks the system for them

    def write(self, data: memoryview) -> None:
        """Copy `data`, bytes, to the start of the memory, which only grows. A call that grows it is rare."""
        if len(data) > self.num_bytes:
            os.ftruncate(self.memory_fd, len(data))
            self.num_bytes = len(data)
        position = 0
        while position < len(data):
            position += os.pwrite(self.memory_fd, data[position:], position)

    def close(self) -> None:
        self.lines.close()
        self.own.close()
        self.other.close()
        os.close(self.memory_fd)


class Sender:
    """Puts objects into an S3 store, large ones from a process of its own. Use `close`, or end this process.

    Guarantees and errors are those of the store; where the process ends by itself, the uploads in flight fail with a
    StoreError and the next one starts another.
    """

    def __init__(self, store: S3Store, num_slots: int) -> None:
        self.inner, self.url = store, store.url
        self._num_slots = num_slots
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def put(self, key: str, data: bytes | memoryview) -> str:
        """Create or replace the object, atomically; returns the sha256 of its bytes, in hex."""
        if len(data) < LARGE_BYTES:
            self.inner.put(key, data)
            return hashlib.sha256(data).hexdigest()
        with self._slot() as slot:
            slot.write(memoryview(data).cast("B"))
            try:
                slot.own.sendall(json.dumps([key, len(data)]).encode() + b"\n")
                answer = slot.lines.readline()
            except OSError:
                answer = b""
            if not answer:
                raise StoreError(f"{self.url}/{key}: put failed: the process that uploads {self._ended()}")
        error, digest = json.loads(answer)
        if error:
            raise StoreError(error)
        return str(digest)

    def close(self) -> None:
        """End the process; uploads in flight fail."""
        with self._lock:
            if self._process is not None:
                self._stop()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[_Slot]:
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()
            if self._process is None:
                self._start()
            process, free = self._process, self._free
        slot = free.get()
        if slot is None:
            free.put(None)  # for the next one that waits
            raise StoreError(f"{self.url}: the process that uploads has ended, and this upload with it")
        try:
            yield slot
        finally:
            with self._lock:
                if self._process is process:
                    free.put(slot)
                else:
                    slot.close()

    def _start(self) -> None:
        slots = [_Slot() for _ in range(self._num_slots)]
        fds = [(slot.other.fileno(), slot.memory_fd) for slot in slots]
        life, other_end = os.pipe()  # the process reads the end of the file when this one is gone
        options = {
            "attempts": self.inner.attempts,
            "timeout_s": self.inner.timeout_s,
            "backoff_s": self.inner.backoff_s,
        }
        what = {"url": self.url, "slots": fds, "life_fd": life, **options}
        # A session of its own: Ctrl-C is for the loop, which decides when a save is given up.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(what)],
            pass_fds=[life, *(fd for pair in fds for fd in pair)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(life)
        self._life = os.fdopen(other_end, "wb")  # closed with this object at the latest, and the process ends
        self._free = queue.SimpleQueue()
        for slot in slots:
            slot.other.close()
            self._free.put(slot)

    def _stop(self) -> None:
        """Under the lock. Slots in use are closed by the uploads that hold them."""
        process, self._process = self._process, None
        assert process is not None
        self._life.close()
        process.wait(CLOSE_TIMEOUT_S)
        with contextlib.suppress(queue.Empty):
            while slot := self._free.get_nowait():
                slot.close()
        self._free.put(None)

    def _ended(self) -> str:
        process = self._process
        code = process.wait(CLOSE_TIMEOUT_S) if process is not None else None
        return "was closed" if code is None else f"ended with exit code {code}: see its output; is there memory left?"


def sender_of(store: Store, num_slots: int) -> Sender | None:
    """What puts large objects into `store` from a process of their own; None where that would gain nothing.

    A folder's files are written in a few calls that hold no lock.
    """
    return Sender(store, num_slots) if isinstance(store, S3Store) else None


def _serve(store: S3Store, line: socket.socket, memory_fd: int) -> None:
    """Answers each announcement on `line` with [an error's text, empty where the object was put; its sha256]."""
    with line.makefile("rb") as announcements, ThreadPoolExecutor(1) as beside:
        for announcement in announcements:
            key, num_bytes = json.loads(announcement)
            error, digest = "", ""
            try:
                # Not closed by hand: the request's reader may still hold a view of it.
                data = memoryview(mmap.mmap(memory_fd, num_bytes, prot=mmap.PROT_READ))
                hashed = beside.submit(lambda data: hashlib.sha256(data).hexdigest(), data)
                store.put(key, data)
                digest = hashed.result()
            except StoreError as failure:
                error = str(failure)
            except Exception as failure:  # the upload waits for an answer whatever happens here
                error = f"{store.url}/{key}: put failed: {type(failure).__name__}: {failure}"
            line.sendall(json.dumps([error, digest]).encode() + b"\n")


def _main(what: dict[str, Any]) -> None:
    os.nice(NICENESS)
    store = S3Store(what["url"], **{name: what[name] for name in OPTIONS})
    for line_fd, memory_fd in what["slots"]:
        line = socket.socket(fileno=line_fd)
        threading.Thread(target=_serve, args=(store, line, memory_fd), daemon=True).start()
    os.read(what["life_fd"], 1)
    os._exit(0)  # what is in flight is of no use without its owner


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
