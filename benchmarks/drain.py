"""A drain in the middle of all windows: how large the save is and how long it takes, folded before and not.

    python -m benchmarks.drain [--json] [--quick]

Two ranks (gloo) train a model whose state is about 1 GB (--quick: 40 MB), with all its levels at ZeRO 1, so that every
gradient sum is whole on every rank. After a few quanta they are told: a preemption, which folds first, and the user's
stop with all the time in the world, which keeps the sums. A third run has its fold at that moment. --json prints one
object as the last line; exit code 1 where the drain's save is more than 1.05 times that of the fold, or takes longer
than a drain of 110 s allows.
"""

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from nltrain.config import RunConfig, override
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.local.drill import VOCAB_SIZE
from nltrain.store import open_store
from nltrain.supervision import Unsupervised, Wish

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN, QUANTUM, AFTER = 64, 128, 3
RANKS, DEADLINE_S, BOUND = 2, 110.0, 1.05
WIDTH = {False: 1280, True: 256}  # by --quick
# {run: (what it is told, quanta between folds)}
RUNS = {"drained": (Wish.PREEMPTED, 64), "on_fold": (Wish.STOP, 1), "exact": (Wish.STOP, 64)}


class Told(Unsupervised):
    """Told to leave after some quanta; keeps when."""

    def __init__(self, wish: Wish) -> None:
        super().__init__(time.time())
        self._wish, self._tokens, self.told_s = wish, 0, 0.0

    def beat(self, phase: str, tokens: int) -> None:
        """Notes the position, as the run reports it."""
        self._tokens = tokens

    def wish(self) -> Wish:
        """GO_ON for the first AFTER quanta, then the wish; notes when it first gave that wish."""
        if self._tokens < AFTER * QUANTUM:
            return Wish.GO_ON
        self.told_s = self.told_s or time.monotonic()
        return self._wish


def config_of(folder: Path, name: str, fold_quanta: int, width: int) -> RunConfig:
    """A two-layer Hope whose slow levels have open windows when it is told to leave."""
    total, long = 1000 * QUANTUM, 512 * QUANTUM
    saves = QUANTUM if fold_quanta == 1 else long
    values = {
        "name": name,
        "output": folder / name,
        "data.prefix": folder / "corpus",
        "data.cache_dir": folder / "cache",
        "checkpoint.url": folder / "runs",
        "model.vocab_size": VOCAB_SIZE,
        "model.width": width,
        "model.cms_hidden": "none",  # as wide as the model asks for
        "model.num_layers": 2,
        "data.seq_len": SEQ_LEN,
        "levels.quantum_tokens": QUANTUM,
        "levels.levels.base.period_tokens": 32 * QUANTUM,
        "levels.levels.base.zero_stage": 1,
        "levels.levels.fast.period_tokens": 32 * QUANTUM,
        "levels.levels.mid.period_tokens": 64 * QUANTUM,
        "levels.levels.slow.period_tokens": 64 * QUANTUM,
        "levels.schedule.kind": "constant",
        "levels.fold_every_tokens": fold_quanta * QUANTUM,
        "checkpoint.every_tokens": saves,
        "train.total_tokens": total,
        "levels.schedule.total_tokens": total,
        "train.micro_batch_size": 1,
        "train.validate_every_tokens": 0,
        "train.validation_sequences": 0,
        "train.sample_tokens": 0,
        "train.reference_max_tokens": 0,
        "track.wandb": "off",
        "cluster.max_workers": RANKS,
    }
    job = runpy.run_path(str(ROOT / "jobs" / "hope_tiny.py"))["config"]
    return override(job, [f"{key}={value}" for key, value in values.items()])


def rank_main(rank: int, folder: Path, width: int) -> None:
    """One rank: trains each run of RUNS until it leaves; rank 0 writes seconds and bytes to found.json."""
    from nltrain.loop import train

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, (wish, fold_quanta) in RUNS.items():
        told = Told(wish)
        left = train(config_of(folder, name, fold_quanta, width), told)
        saved = folder / "runs" / name / "checkpoints" / left["checkpoint"]
        found[f"{name}_s"] = round(time.monotonic() - told.told_s, 2)
        found[f"{name}_bytes"] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a state of 40 MB instead of 1 GB")
    options = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="nltrain-drain-") as name:
        folder = Path(name)
        documents = list(stdlib_corpus())[:12]
        tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
        shape = PrepareConfig(SEQ_LEN, validation_fraction=0.1)
        prepare(documents, open_store(str(folder / "corpus")), tokenizer, shape)
        torch.multiprocessing.start_processes(rank_main, (folder, WIDTH[options.quick]), nprocs=RANKS)
        found = json.loads((folder / "found.json").read_text())
    found["drained_over_fold"] = round(found["drained_bytes"] / found["on_fold_bytes"], 4)
    found["exact_over_fold"] = round(found["exact_bytes"] / found["on_fold_bytes"], 4)
    for key, value in found.items():
        print(f"{key:20} {value:,}", flush=True)
    if options.json:
        print(json.dumps(found), flush=True)
    return 0 if found["drained_over_fold"] <= BOUND and found["drained_s"] <= DEADLINE_S else 1


if __name__ == "__main__":
    sys.exit(main())
