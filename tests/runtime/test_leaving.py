"""Two ranks, one of which is told to leave: both save at the same quantum, and the run goes on as if nothing had been.

Beside it, in the same processes: the meter names the rank whose forward passes are slow.
"""

import json
import math
import runpy
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import _forked as forked
from nltrain.config import override
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.errors import ConfigError
from nltrain.levels.quantum import cut_quantum
from nltrain.local.drill import QUANTUM, SEQ_LEN, SMALL, VOCAB_SIZE
from nltrain.loop import train
from nltrain.model import LanguageModel
from nltrain.network import free_ports
from nltrain.store import open_store
from nltrain.supervision import Wish
from nltrain.track.metrics import read_rows
from nltrain.track.progress import Meter
from nltrain.track.record import claim_folder

ROOT = Path(__file__).resolve().parents[2]
QUANTA, LEAVE_AFTER = 12, 5
WORLD_SIZE = 2


class Told:
    """A supervision that wishes something once T is reached."""

    def __init__(self, wish, tokens, left_s=math.inf):
        self.started_s, self._wish, self._tokens = time.time(), wish, tokens
        self._left_s = left_s
        self.seen, self.phases = 0, []

    def beat(self, phase, tokens):
        self.seen = tokens
        self.phases.append(phase)

    def wish(self):
        return self._wish if self.seen >= self._tokens else Wish.GO_ON

    def left_s(self):
        return self._left_s


def config(folder, name, **more):
    job = runpy.run_path(str(ROOT / "jobs" / "hope_tiny.py"))["config"]
    values = (
        SMALL
        | {
            "name": name,
            "output": folder / name,
            "data.prefix": folder / "corpus",
            "data.cache_dir": folder / "cache",
            "checkpoint.url": folder / "runs",
            "train.total_tokens": QUANTA * QUANTUM,
            "levels.schedule.total_tokens": QUANTA * QUANTUM,
            "cluster.max_workers": WORLD_SIZE,
        }
        | {key.replace("__", "."): value for key, value in more.items()}
    )
    return override(job, [f"{key}={value}" for key, value in values.items()])


def nan_in_the_last_quantum(loss):
    """A planted fault: the loss of every micro-step beyond the last quantum but one is not a number."""
    calls = 0

    def faulty(self, *batch):
        nonlocal calls
        calls += self.training
        value = loss(self, *batch)
        micro_steps = len(cut_quantum(QUANTUM // SEQ_LEN, 4, WORLD_SIZE))
        return value * float("nan") if self.training and calls > (QUANTA - 1) * micro_steps else value

    return faulty


def ranks(rank, environment, folder, port):
    forked.begin(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    found = {"straight": train(config(folder, "straight"))}
    # Only rank 1 is told.
    told = Told(Wish.STOP, LEAVE_AFTER * QUANTUM) if rank == 1 else Told(Wish.GO_ON, 0)
    found["left"] = train(config(folder, "broken"), told)
    found["resumed"] = train(config(folder, "broken"))
    found["phases"] = sorted(set(told.phases))
    # The machine that takes over has none of the files of the first.
    train(config(folder, "moved"), Told(Wish.STOP, LEAVE_AFTER * QUANTUM))
    found["moved"] = train(config(folder, "moved", output=folder / "another-machine"))
    found["moved_again"] = train(config(folder, "moved", output=folder / "a-third-machine"))
    found["skipping"] = train(
        config(folder, "skipping", checkpoint__when_busy="skip"), Told(Wish.STOP, LEAVE_AFTER * QUANTUM)
    )
    # At the same T: left for the world to change, left in a hurry, and on the fold clock.
    after = LEAVE_AFTER * QUANTUM
    found["resized"] = train(config(folder, "resized"), Told(Wish.RESIZE, after))
    found["hurried"] = train(config(folder, "hurried"), Told(Wish.STOP, after, left_s=10.1))
    found["hurried_on"] = train(config(folder, "hurried"))
    every = {"levels__fold_every_tokens": QUANTUM, "checkpoint__every_tokens": QUANTUM, "checkpoint__keep_last": 99}
    train(config(folder, "on_fold", **every), Told(Wish.STOP, after + QUANTUM))
    found["fork"] = train(config(folder, "fork", checkpoint__resume=f"{folder}/runs/broken"))
    honest, LanguageModel.loss = LanguageModel.loss, nan_in_the_last_quantum(LanguageModel.loss)
    found["nan_at_the_end"] = train(config(folder, "nan_at_the_end"))
    LanguageModel.loss = honest

    meter = Meter(torch.device("cpu"))
    for _ in range(3):
        meter.start()
        time.sleep(0.12 if rank == 1 else 0.02)
        meter.forward_ended()
        meter.add(*(torch.tensor(x, dtype=torch.float64) for x in (6.0, 2.0, 0.0)))
    meter.add(*(torch.tensor(x, dtype=torch.float64) for x in (0.0, 0.0, 99.0)))
    found["interval"] = meter.take(data_wait_s=0.5 * rank)._asdict()

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
    arguments = (forked.environment(), folder, port)
    torch.multiprocessing.start_processes(ranks, arguments, nprocs=WORLD_SIZE, start_method=forked.METHOD)
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
        interval = rank["interval"]
        assert interval["loss"] == 3.0
        assert (interval["left_out"], interval["left_out_tokens"]) == (1, 99)
        assert interval["slowest_rank"] == 1
        assert interval["slowest_over_median"] > 2
        assert interval["data_wait_s"] == 0.5


def test_a_machine_that_takes_over_knows_the_whole_run(found):
    folder, each = found
    moved = each[0]["moved"]
    assert moved["weights_sha256"] == each[0]["straight"]["weights_sha256"]
    assert (moved["resumes"], moved["tokens_repeated"]) == (1, 0)
    assert moved["loss_first"] == each[0]["straight"]["loss_first"]
    steps = [row["tokens"] for row in read_rows(folder / "another-machine") if row["kind"] == "step"]
    assert steps == [QUANTUM * (n + 1) for n in range(QUANTA)]


def test_a_finished_run_submitted_again_elsewhere_still_has_its_summary(found):
    _, each = found
    assert each[0]["moved_again"]["weights_sha256"] == each[0]["straight"]["weights_sha256"]
    assert each[0]["moved_again"]["tokens"] == QUANTA * QUANTUM


def test_leaving_saves_even_where_a_busy_writer_lets_saves_be_skipped(found):
    folder, each = found
    left = each[0]["skipping"]
    assert f"tokens_{left['tokens']:012d}" in left["checkpoint"]
    assert (folder / "runs" / "skipping" / "checkpoints" / left["checkpoint"] / "manifest.json").exists()


def bytes_saved(folder, run, tokens, files="*"):
    """Bytes of these files of the checkpoint at this T."""
    [manifest] = (folder / "runs" / run / "checkpoints").glob(f"tokens_{tokens:012d}-*/manifest.json")
    return sum(path.stat().st_size for path in manifest.parent.rglob(files) if path.is_file())


def test_a_save_before_the_world_changes_is_as_small_as_one_on_the_fold(found):
    folder, each = found
    tokens = each[0]["resized"]["tokens"]
    on_fold = bytes_saved(folder, "on_fold", tokens)
    assert bytes_saved(folder, "resized", tokens) <= 1.05 * on_fold
    assert each[0]["left"]["tokens"] == tokens
    # What only one rank has: its random state; where the save is exact, its unreduced sums as well.
    own = {run: bytes_saved(folder, run, tokens, "own-*") for run in ("on_fold", "resized", "hurried", "broken")}
    assert own["on_fold"] == own["resized"] == own["hurried"] < own["broken"] - 10_000


def test_a_stop_that_has_no_time_for_an_exact_save_folds_and_the_run_goes_on_as_close(found):
    folder, each = found
    tokens = each[0]["hurried"]["tokens"]
    assert bytes_saved(folder, "hurried", tokens) <= 1.05 * bytes_saved(folder, "on_fold", tokens)
    assert each[0]["hurried_on"]["loss_last"] == pytest.approx(each[0]["straight"]["loss_last"], abs=1e-4)
    assert each[0]["hurried_on"]["tokens_repeated"] == 0


def test_another_run_goes_on_from_a_checkpoint_picked_by_hand(found):
    _, each = found
    assert each[0]["fork"]["level_updates"]["base"]["done"] == QUANTA


def test_a_nan_at_the_very_end_leaves_no_level_touched_and_the_run_finishes(found):
    folder, each = found
    summary = each[0]["nan_at_the_end"]
    assert summary["finished"]
    assert summary["loss_last"] is None
    base = summary["level_updates"]["base"]
    assert (base["done"], base["skipped"], base["due"]) == (QUANTA - 1, 1, QUANTA)
    (last,) = [
        r for r in read_rows(folder / "nan_at_the_end") if r["kind"] == "step" and r["tokens"] == QUANTA * QUANTUM
    ]
    assert last["left_out"] >= 1
    (named,) = [row for row in read_rows(folder / "nan_at_the_end") if row["kind"] == "left_out"]
    sequences = QUANTUM // SEQ_LEN
    assert {part["reason"] for part in named["parts"]} == {"loss not finite"}
    assert {part["rank"] for part in named["parts"]} == set(range(WORLD_SIZE))
    samples = [sample for part in named["parts"] for sample in part["samples"]]
    assert sorted(samples) == list(range((QUANTA - 1) * sequences, QUANTA * sequences))
    assert named["left_out_tokens"] == last["left_out_tokens"] == sum(part["tokens"] for part in named["parts"]) > 0


def test_a_folder_belongs_to_one_run(found):
    folder, _ = found
    claim_folder(folder / "straight", "straight", "x")
    with pytest.raises(ConfigError, match="holds the run 'straight'; give 'other' a folder of its own"):
        claim_folder(folder / "straight", "other", "x")
