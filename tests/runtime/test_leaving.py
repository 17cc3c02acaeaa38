"""Two ranks, one of which is told to leave: both save at the same quantum, and the run goes on as if nothing had been.

Beside it, in the same processes: the meter names the rank whose forward passes are slow.
"""

import json
import runpy
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nltrain.config import ConfigError, override
from nltrain.data import PrepareConfig, open_store, prepare, stdlib_corpus, train_tokenizer
from nltrain.loop import train
from nltrain.record import claim_folder
from nltrain.runtime.drill import QUANTUM, SEQ_LEN, SMALL, VOCAB_SIZE
from nltrain.runtime.local import free_ports
from nltrain.track.metrics import read_rows
from nltrain.track.progress import Meter
from nltrain.track.supervision import Wish

ROOT = Path(__file__).resolve().parents[2]
QUANTA, LEAVE_AFTER = 12, 5
WORLD_SIZE = 2


class Told:
    """A supervision that wishes something once T is reached."""

    def __init__(self, wish, tokens):
        self.started_s, self._wish, self._tokens = time.time(), wish, tokens
        self.seen, self.phases = 0, []

    def beat(self, phase, tokens):
        self.seen = tokens
        self.phases.append(phase)

    def wish(self):
        return self._wish if self.seen >= self._tokens else Wish.GO_ON


def config(folder, name):
    job = runpy.run_path(str(ROOT / "jobs" / "hope_tiny.py"))["config"]
    values = SMALL | {
        "name": name,
        "output": folder / name,
        "data.prefix": folder / "corpus",
        "data.cache_dir": folder / "cache",
        "checkpoint.url": folder / "runs",
        "train.total_tokens": QUANTA * QUANTUM,
        "levels.schedule.total_tokens": QUANTA * QUANTUM,
        "cluster.max_workers": WORLD_SIZE,
    }
    return override(job, [f"{key}={value}" for key, value in values.items()])


def ranks(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    found = {"straight": train(config(folder, "straight"))}
    # Only rank 1 is told.
    told = Told(Wish.STOP, LEAVE_AFTER * QUANTUM) if rank == 1 else Told(Wish.GO_ON, 0)
    found["left"] = train(config(folder, "broken"), told)
    found["resumed"] = train(config(folder, "broken"))
    found["phases"] = sorted(set(told.phases))

    meter = Meter(torch.device("cpu"))
    for _ in range(3):
        meter.start()
        time.sleep(0.12 if rank == 1 else 0.02)
        meter.add(torch.tensor(6.0), 2)
    found["interval"] = meter.take()

    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaving")
    documents = list(stdlib_corpus())[:12]
    tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
    prepare(documents, open_store(str(folder / "corpus")), tokenizer, PrepareConfig(SEQ_LEN, validation_fraction=0.1))
    [port] = free_ports(1)
    torch.multiprocessing.spawn(ranks, (folder, port), nprocs=WORLD_SIZE)
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def test_all_ranks_leave_together_when_one_is_told(found):
    _, each = found
    for rank in each:
        assert rank["left"]["left"] == "stopped"
        assert rank["left"]["tokens"] in (LEAVE_AFTER * QUANTUM, (LEAVE_AFTER + 1) * QUANTUM)
    assert each[0]["left"] == each[1]["left"]


def test_a_run_that_left_ends_with_the_weights_of_one_that_did_not(found):
    _, each = found
    assert each[0]["resumed"]["finished"]
    assert each[0]["resumed"]["weights_sha256"] == each[0]["straight"]["weights_sha256"]
    assert each[0]["resumed"]["tokens_repeated"] == 0


def test_the_watchdog_hears_of_every_phase(found):
    _, each = found
    assert set(each[0]["phases"]) >= {"starting", "waiting for data", "training", "saving"}


def test_rows_tell_why_and_where_the_time_went(found):
    folder, _ = found
    kinds = [row["kind"] for row in read_rows(folder / "broken")]
    assert kinds.count("end") == kinds.count("goodput") == 2
    ends = [row for row in read_rows(folder / "broken") if row["kind"] == "end"]
    assert [row["reason"] for row in ends] == ["stopped", "finished"]
    status = json.loads((folder / "broken" / "status.json").read_text())
    assert status["state"] == "finished"
    assert [attempt["reason"] for attempt in status["attempts"]] == ["", "submitted again"]


def test_the_slow_rank_is_named_and_the_loss_is_that_of_all(found):
    _, each = found
    for rank in each:
        loss, _, slowest, ratio = rank["interval"]
        assert loss == 3.0
        assert slowest == 1
        assert ratio > 2


def test_a_folder_belongs_to_one_run(found):
    folder, _ = found
    claim_folder(folder / "straight", "straight", "x")
    with pytest.raises(ConfigError, match="holds the run 'straight'; give 'other' a folder of its own"):
        claim_folder(folder / "straight", "other", "x")
