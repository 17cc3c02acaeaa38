"""What benchmarks.uploads runs beside its loop: uploads as a checkpoint makes them, and the server that takes them.

    python -m benchmarks._uploader sink          # prints its port
    python -m benchmarks._uploader neighbour     # uploads between the lines "1" and "0" of its input

The neighbour does what the rank does, with the same code, in a process that shares nothing with the loop. The sink
takes bytes off the connection without copying them (Linux: MSG_TRUNC), as the real one is on another machine and uses
no memory bandwidth of this one.
"""

import os
import socket
import sys
import threading
import time

from nltrain.checkpoint.transfer import Hashed, Puts, write_files
from nltrain.store import open_store
from nltrain.store.sender import Sender

FILE_BYTES = 64 << 20
NUM_THREADS = 4  # as checkpoint.num_threads
FILES_OF_A_SAVE = 16


class _StoppedError(Exception):
    """The window is over; no file is begun."""


class Uploader(threading.Thread):
    """Writes files while `running`, four at a time, each hashed; counts the bytes of those that are stored.

    `way`: "process", through a process of its own; "one by one", the same, one file after the other; "thread", from
    threads of this process.
    """

    def __init__(self, url: str, other_cores: list[int]) -> None:
        super().__init__(daemon=True)
        store = open_store(url)
        self._stores: dict[str, Puts] = {"process": Sender(store, NUM_THREADS), "thread": Hashed(store)}
        self._stores["one by one"] = self._stores["process"]
        self._cores, self._data = other_cores, memoryview(bytearray(FILE_BYTES))
        self._lock = threading.Lock()
        self.way, self.num_bytes = "process", 0
        self.running, self.idle = threading.Event(), threading.Event()

    def put(self, key: str, data: bytes | memoryview) -> str:
        """Create or replace the object, in the present way; returns its sha256."""
        digest = self._stores[self.way].put(key, data)
        with self._lock:
            self.num_bytes += len(data)
        return digest

    def run(self) -> None:
        """Save after save while `running`; ends with the process."""
        os.sched_setaffinity(0, self._cores)  # of this thread, and of the threads and the process that it starts
        files = [(f"file{i}", f"file{i}", self._produce) for i in range(FILES_OF_A_SAVE)]
        while True:
            self.idle.set()
            self.running.wait()
            self.idle.clear()
            while self.way == "one by one" and self.running.is_set():
                self.put("file", self._data)
            try:
                write_files(self, files, NUM_THREADS)
            except _StoppedError:
                continue

    def _produce(self) -> memoryview:
        if not self.running.is_set():
            raise _StoppedError
        return self._data


def _sink() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=_answer, args=(listener.accept()[0],), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    buffer, rest = bytearray(1 << 20), b""
    while True:
        while b"\r\n\r\n" not in rest:
            if not (got := connection.recv(1 << 16)):
                return
            rest += got
        head, _, rest = rest.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        left = int(fields.get(b"content-length", 0)) - len(rest)
        if fields.get(b"expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while left > 0:
            if not (num_bytes := connection.recv_into(buffer, min(left, len(buffer)), socket.MSG_TRUNC)):
                return
            left -= num_bytes
        rest = b""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: x\r\n\r\n")


def _neighbour() -> None:
    uploader = Uploader("s3://sink/neighbour", sorted(os.sched_getaffinity(0)))
    uploader.start()
    for line in sys.stdin:
        if line.startswith("1"):
            uploader.running.set()
        else:
            uploader.running.clear()
            while not uploader.idle.is_set():
                time.sleep(0.002)
        print(uploader.num_bytes, flush=True)


if __name__ == "__main__":
    {"sink": _sink, "neighbour": _neighbour}[sys.argv[1]]()
