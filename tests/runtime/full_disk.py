"""A run and a checkpointer on file systems that fill up; prints what it saw as JSON. To be started by FULL_DISK.

unshare --user --map-root-user --mount sh -c '...' -- FOLDER
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nltrain.checkpoint import CheckpointConfig, Checkpointer
from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.fragment import Fragment
from nltrain.local.drill import SEQ_LEN, VOCAB_SIZE
from nltrain.loop import train
from nltrain.network import free_ports
from nltrain.store import open_store

SMALL_DISK = "16k"  # four pages: the run's first records, and no more
MOUNT = f"mount -t tmpfs -o size={SMALL_DISK} none $0/small && mount -t tmpfs -o size=8m none $0/disk && exec "
FULL_DISK = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
NUMEL = 250_000  # 1 MB


def run_with_a_full_output(folder):
    """A run whose output folder takes four pages."""
    from tests.runtime.test_going_on import config

    documents = list(stdlib_corpus())[:6]
    tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
    prepare(documents, open_store(str(folder / "corpus")), tokenizer, PrepareConfig(SEQ_LEN, validation_fraction=0.3))
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_ports(1)[0]}", rank=0, world_size=1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(config(folder, "full", output=folder / "small"))
    dist.destroy_process_group()
    return {
        "said": said.getvalue(),
        "rows": (folder / "small" / "metrics" / "attempt_0001.jsonl").read_text(),
        "tokens": [info.tokens for info in list_checkpoints(open_store(str(folder / "runs")), "full") if info.complete],
    }


def leave_free(disk, num_bytes):
    """Fill the disk but for about so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - num_bytes)))


def saves_on_a_full_disk(disk, when_full, keep_last):
    """Two saves with room, then two with room for half of one."""
    url = str(disk / when_full)
    config = CheckpointConfig(url, keep_last=keep_last, when_full=when_full, asynchronous=False, max_failures=5)
    store = open_store(url)
    saves = Checkpointer(store, "run", None, config)
    found = {"errors": {}, "files": {}}
    for tokens in (100, 200, 300, 400):
        if tokens == 300:
            leave_free(disk, 500_000)
        tensor = torch.full((NUMEL,), float(tokens))
        saves.save(tokens, {"w.master": Fragment(tensor, 0, NUMEL)}, {"config": {}})
        found["errors"] |= {result.tokens: result.error for result in saves.poll() if result.error}
        found["files"][tokens] = sorted({item.key.split("/")[2][:19] for item in store.list("run/checkpoints/")})
    (disk / "filler").unlink()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    result = {
        "run": run_with_a_full_output(folder),
        "fail": saves_on_a_full_disk(folder / "disk", "fail", 2),
        "make_room": saves_on_a_full_disk(folder / "disk", "make_room", 2),
    }
    (folder / "found.json").write_text(json.dumps(result))
