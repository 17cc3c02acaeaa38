"""Two attempts of one run: the older one, stopped inside a save and continued later, touches nothing of the newer."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nltrain.checkpoint import Checkpointer
from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.store import open_store
from tests.checkpoint.support import assert_filled, held, settings, wanted

# Before the first data file, with all data written, and between the last look for newer attempts and the commit itself.
MOMENTS = ("/state-00000", "/layout.json", "/manifest.json")

WORKER = """
import signal, sys, threading
from nltrain.checkpoint import Checkpointer, StaleAttemptError
from nltrain.store import open_store
from tests.checkpoint.support import held, settings

url, run, moment = sys.argv[1:]
store = open_store(url)
checkpointer = Checkpointer(store, run, None, settings(url, num_threads=1))
checkpointer.save(100, held("replicated", 0, 1, salt=100), {"note": "old"})
checkpointer.wait()

def paused(operation):
    def call(key, data):
        if moment in key:
            print("inside", flush=True)
            # Stops the whole process, as a stalled machine would; sent to this thread, it cannot run on meanwhile.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return operation(key, data)
    return call

store.put, store.put_if_absent = paused(store.put), paused(store.put_if_absent)
checkpointer.save(200, held("replicated", 0, 1, salt=200), {"note": "old"})
try:
    checkpointer.wait()
except StaleAttemptError as error:
    print("stale:", error, flush=True)
    try:
        checkpointer.save(300, held("replicated", 0, 1, salt=300), {"note": "old"})
    except StaleAttemptError:
        print("and stays so", flush=True)
"""


def stopped(process: subprocess.Popen) -> bool:
    with open(f"/proc/{process.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


@pytest.fixture(scope="module")
def s3() -> Iterator[EmbeddedS3]:
    with EmbeddedS3("checkpoints") as server, server.in_environment():
        yield server


@pytest.mark.parametrize("place", ["s3", "folder"])
def test_an_older_attempt_that_wakes_up_cannot_commit_or_overwrite(place: str, s3: EmbeddedS3, tmp_path: Path) -> None:
    url = "s3://checkpoints/attempts" if place == "s3" else str(tmp_path)
    store = open_store(url)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    older = {
        moment: subprocess.Popen(
            [sys.executable, "-c", WORKER, url, f"run-{number}", moment],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number, moment in enumerate(MOMENTS)
    }
    try:
        for number, (moment, process) in enumerate(older.items()):
            assert process.stdout.readline() == "inside\n"
            while not stopped(process):
                time.sleep(0.01)
            run = f"run-{number}"
            newer = Checkpointer(store, run, None, settings(url))
            fragments = wanted("replicated", 0, 1)
            assert newer.resume(fragments).tokens == 100
            for tokens in (200, 300):
                newer.save(tokens, held("replicated", 0, 1, salt=tokens + 1), {"note": "new"})
                newer.wait()
            before = {item.key: store.get(item.key) for item in store.list(f"{run}/") if "attempt_0001" not in item.key}
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate(timeout=60)
            assert "stale: " in output and "and stays so" in output, f"{moment}: {output}"
            after = {item.key: store.get(item.key) for item in store.list(f"{run}/") if "attempt_0001" not in item.key}
            assert after == before, moment
            complete = [info.name for info in list_checkpoints(store, run) if info.complete]
            assert [name.split("-")[0][-3:] + name[-2:] for name in complete] == ["10001", "20002", "30002"]
            StoredCheckpoint(store, run, complete[-1]).verify()
            last = Checkpointer(store, run, None, settings(url))
            assert last.resume(fragments).state["note"] == "new"
            assert_filled(fragments, salt=301)
    finally:
        for process in older.values():
            process.kill()
            process.wait()
