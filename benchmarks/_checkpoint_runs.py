"""Runs of the real loop on plain processes for benchmarks.checkpoint: killed, stopped, resumed at other world sizes.

    python -m benchmarks._checkpoint_runs RANK SIZE MEETING CONFIG     one rank (started by `Group`)

The model is a small Hope with four levels; a checkpoint every SAVE_EVERY quanta, the slow level ticks every 16.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.hope_tiny import config as hope_tiny
from nltrain.checkpoint.catalog import list_checkpoints
from nltrain.checkpoint.manifest import MANIFEST, checkpoints_prefix
from nltrain.checkpoint.stored import StoredCheckpoint
from nltrain.config import RunConfig, from_dict, override, to_dict
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.store import Store, open_store
from nltrain.supervision import Unsupervised, Wish
from nltrain.track.metrics import effective, read_rows

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, QUANTUM, SAVE_EVERY = 64, 512, 5
SMALL = (
    "model.vocab_size=512", "model.width=32", "model.num_layers=1", "model.head_dim=16", "model.memory_hidden=16",
    "model.rule.chunk_mem=16", "model.rule.chunk_other=16", f"data.seq_len={SEQ_LEN}",
    f"levels.quantum_tokens={QUANTUM}", f"levels.levels.base.period_tokens={QUANTUM}",
    f"levels.levels.fast.period_tokens={QUANTUM}", f"levels.levels.mid.period_tokens={4 * QUANTUM}",
    f"levels.levels.slow.period_tokens={16 * QUANTUM}", "levels.schedule.kind=constant",
    f"levels.schedule.warmup_tokens={4 * QUANTUM}", f"levels.fold_every_tokens={SAVE_EVERY * QUANTUM}",
    f"checkpoint.every_tokens={SAVE_EVERY * QUANTUM}", "train.validate_every_tokens=0",
    "train.validation_sequences=0", "train.sample_tokens=0", "train.micro_batch_size=2", "track.wandb=off",
    "track.log_every_quanta=1",
)  # fmt: skip
# ||w - reference|| / ||reference||, the worst weight tensor: fp32 sums in another order, carried through the quanta.
RESHARD_BOUND = 1e-4
GRACE_S = 30.0
START_LIMIT_S = 600.0


class Told(Unsupervised):
    """Told to stop by SIGTERM, at any moment of a step."""

    def __init__(self) -> None:
        super().__init__(time.time())
        self._wish = Wish.GO_ON
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._wish = Wish.STOP

    def wish(self) -> Wish:
        """STOP once this process has received SIGTERM."""
        return self._wish


def rank_main(rank: int, size: int, meeting: str, values: dict[str, Any]) -> None:
    """One rank: joins the process group and trains the run to its end."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    import torch.distributed as dist

    from nltrain.loop import train

    supervision = Told()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    train(from_dict(RunConfig, values), supervision)
    dist.barrier()
    dist.destroy_process_group()


class Group:
    """The ranks of one attempt."""

    count = 0

    def __init__(self, config: RunConfig, size: int) -> None:
        Group.count += 1
        self.log = Path(config.output).parent / f"{config.name}-{Group.count}.log"
        meeting = self.log.with_suffix(".meeting")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with self.log.open("wb") as output:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks._checkpoint_runs", str(rank), str(size), str(meeting),
                     json.dumps(to_dict(config))],
                    cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )
                for rank in range(size)
            ]  # fmt: skip

    def alive(self) -> bool:
        """Whether no rank has ended."""
        return all(process.poll() is None for process in self.ranks)

    def kill(self, order: Sequence[int], pause_s: float) -> None:
        """SIGKILL one rank, the others a moment later."""
        for position, rank in enumerate(order):
            self.ranks[rank].kill()
            time.sleep(pause_s if position == 0 else 0)
        for process in self.ranks:
            process.wait()

    def wait(self, timeout_s: float = START_LIMIT_S) -> None:
        """Raises RuntimeError with the end of the log when a rank fails or takes too long."""
        try:
            codes = [process.wait(timeout_s) for process in self.ranks]
        except subprocess.TimeoutExpired:
            codes = [-1]
        if any(codes):
            self.kill(range(len(self.ranks)), 0)
            raise RuntimeError(f"a rank failed ({codes}):\n{self.log.read_text()[-3000:]}")


def config_of(url: str, folder: Path, name: str, num_quanta: int, *overrides: str) -> RunConfig:
    """The small run over the corpus at `url`, with its metrics and caches in `folder`."""
    return override(
        hope_tiny,
        [
            f"name={name}", f"output={folder / name}", f"data.prefix={url}/corpus", f"checkpoint.url={url}/runs",
            f"train.total_tokens={num_quanta * QUANTUM}", f"data.cache_dir={folder / 'cache'}", *SMALL, *overrides,
        ],
    )  # fmt: skip


def make_corpus(url: str) -> None:
    """Prepares 250 kB of the standard library as a dataset at `url`/corpus."""
    documents = [document for document in stdlib_corpus(max_bytes=250_000) if document.text.strip()]
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=512)
    prepare(documents, open_store(f"{url}/corpus"), tokenizer, PrepareConfig(seq_len=SEQ_LEN, validation_fraction=0.1))


def tokens_done(config: RunConfig) -> int:
    """T of the last step that any attempt wrote down."""
    return max((row["tokens"] for row in read_rows(config.output) if row["kind"] == "step"), default=0)


def unfinished(store: Store, run: str) -> set[str]:
    """Folders that are being written: files, but no manifest."""
    prefix = checkpoints_prefix(run)
    folders: dict[str, set[str]] = {}
    for item in store.list(prefix):
        name, _, path = item.key.removeprefix(prefix).partition("/")
        folders.setdefault(name, set()).add(path)
    return {name for name, files in folders.items() if MANIFEST not in files}


def wait_for(group: Group, condition: Any, what: str) -> None:
    """Waits until `condition()` holds. Raises RuntimeError if the run ends or START_LIMIT_S pass before."""
    limit_s = time.monotonic() + START_LIMIT_S
    while not condition():
        if not group.alive() or time.monotonic() > limit_s:
            raise RuntimeError(f"the run ended before {what}:\n{group.log.read_text()[-3000:]}")
        time.sleep(0.003)


def run_with_kills(config: RunConfig, size: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """The run, SIGKILLed `kills` times: at random tokens, inside saves, and while it starts; then left to end."""
    store = open_store(config.checkpoint.url)
    kinds = (["step", "save", "step", "start", "save", "step"] * kills)[:kills]
    chance.shuffle(kinds)
    points = sorted(chance.uniform(0.0, 0.9) * config.train.total_tokens for _ in kinds)
    inside_save = inside_slow_window = 0
    for kind, point in zip(kinds, points, strict=True):
        group = Group(config, size)
        if kind == "start":
            time.sleep(chance.uniform(0.5, 10.0))
        else:
            wait_for(group, lambda point=point: tokens_done(config) >= point, f"{point:.0f} tokens")
            if kind == "save":
                before = unfinished(store, config.name)
                wait_for(group, lambda before=before: unfinished(store, config.name) - before, "a save")
                time.sleep(chance.uniform(0.0, 0.02))
            else:
                time.sleep(chance.uniform(0.0, 0.5))
        if not group.alive():
            raise RuntimeError(f"the run ended by itself before it was killed:\n{group.log.read_text()[-3000:]}")
        group.kill(chance.sample(range(size), size), chance.uniform(0.0, 0.2))
        inside_save += bool(unfinished(store, config.name))
        inside_slow_window += tokens_done(config) // QUANTUM % 16 != 0
        print(f"  killed ({kind}) after {tokens_done(config):,} tokens; {size} ranks", flush=True)
    Group(config, size).wait()
    return {"kills": kills, "kills_inside_save": inside_save, "kills_inside_slow_window": inside_slow_window}


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """What differs between the ends of two runs: stored tensors of every kind, clocks, data position, RNG, losses.

    Of the generators torch's is compared: nothing that trains draws from Python's or NumPy's, while retries of the
    store do.
    """
    found = []
    first, second = (newest(config) for config in (a, b))
    hashes = [{path: entry.sha256 for path, entry in stored.files.items()} for stored in (first, second)]
    if hashes[0].keys() != hashes[1].keys():
        found.append("the files' names")
    compared = [path for path in hashes[0] if path != "state.json" and "/own" not in path]
    found += [path for path in compared if hashes[0][path] != hashes[1].get(path)]
    for rank in range(first.manifest.world_size):
        own = [stored.rank_state(rank) for stored in (first, second)]
        if not torch.equal(own[0]["rng"]["torch"], own[1]["rng"]["torch"]):
            found.append(f"the random generator of rank {rank}")
        windows = [state["levels"] for state in own]
        if windows[0].keys() != windows[1].keys() or any(
            not torch.equal(windows[0][n], windows[1][n]) for n in windows[0]
        ):
            found.append(f"the unreduced sums of rank {rank}")
    for part in ("levels", "data", "dataset_fingerprint"):
        if first.state[part] != second.state[part]:
            found.append(f"state.{part}")
    losses = [losses_of(config) for config in (a, b)]
    if losses[0] != losses[1] or len(losses[0]) != a.num_quanta:
        found.append(f"losses ({len(losses[0])} and {len(losses[1])} steps)")
    return found


def losses_of(config: RunConfig) -> dict[int, float]:
    """{T: loss}, each token counted once."""
    return {row["tokens"]: row["loss"] for row in effective(read_rows(config.output)) if row["kind"] == "step"}


def newest(config: RunConfig) -> StoredCheckpoint:
    """The last complete checkpoint of the run."""
    store = open_store(config.checkpoint.url)
    name = [info.name for info in list_checkpoints(store, config.name) if info.complete][-1]
    return StoredCheckpoint(store, config.name, name)


def run_with_sigterm(config: RunConfig, size: int) -> dict[str, Any]:
    """SIGTERM during a step away from the fold: saved, gone within the grace time, resumed to the end."""
    group = Group(config, size)
    wait_for(group, lambda: tokens_done(config) // QUANTUM % SAVE_EVERY == 2, "the middle between two folds")
    began = time.monotonic()
    for process in group.ranks:
        process.terminate()
    group.wait(GRACE_S)
    seconds, tokens = time.monotonic() - began, newest(config).manifest.tokens
    Group(config, size).wait()
    return {"sigterm_to_exit_s": seconds, "sigterm_saved_outside_fold": tokens % (SAVE_EVERY * QUANTUM) != 0}


def largest_error(a: RunConfig, b: RunConfig) -> float:
    """||a - b|| / ||b|| of the worst weight tensor."""
    first, second = newest(a), newest(b)
    pairs = [(first.read_weight(name), second.read_weight(name)) for name in second.weights]
    return max(float((x - y).norm() / y.norm().clamp_min(1e-3)) for x, y in pairs)


def reshard(url: str, folder: Path, num_quanta: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Saved at 4 ranks, gone on at other sizes with other ZeRO stages, and back at 4 from there."""
    keep = ("checkpoint.keep_last=100", "checkpoint.may_change=name")
    whole = config_of(url, folder, "four", num_quanta, *keep)
    Group(whole, 4).wait()
    start = num_quanta // 2 // SAVE_EVERY * SAVE_EVERY
    errors, positions = {}, True
    stages = {1: (1, 3, 2, 1), 2: (3, 1, 2, 2), 3: (1, 2, 3, 1)}
    last = whole
    for size in sizes:
        changed = [
            f"levels.levels.{level}.zero_stage={stage}"
            for level, stage in zip(("base", "fast", "mid", "slow"), stages[size], strict=True)
        ]
        last = config_of(
            url,
            folder,
            f"at-{size}",
            num_quanta,
            *keep,
            *changed,
            f"checkpoint.resume={url}/runs/four@{start * QUANTUM}",
        )
        Group(last, size).wait()
        errors[f"4 -> {size}"] = largest_error(last, whole)
        positions &= newest(last).state["data"] == newest(whole).state["data"]
    middle = (start + SAVE_EVERY) * QUANTUM
    back = config_of(url, folder, "back", num_quanta, *keep, f"checkpoint.resume={url}/runs/{last.name}@{middle}")
    Group(back, 4).wait()
    errors[f"4 -> {sizes[-1]} -> 4"] = largest_error(back, whole)
    return {
        "reshard_errors": errors,
        "reshard_max_rel_err": max(errors.values()),
        "reshard_data_position_equal": positions,
    }


def prove(url: str, folder: Path, quick: bool) -> dict[str, Any]:
    """All of it. Prints a line per event."""
    make_corpus(url)
    chance = random.Random(20)
    num_quanta, kills, size = (40, 3, 2) if quick else (120, 20, 2)
    reference = config_of(url, folder, "reference", num_quanta)
    Group(reference, size).wait()
    print(f"  the reference run has ended: {num_quanta} quanta, {size} ranks", flush=True)
    killed = config_of(url, folder, "killed", num_quanta)
    result = run_with_kills(killed, size, kills, chance)
    result["killed_run_differs_in"] = differences(killed, reference)
    result["final_state_bitwise_equal"] = not result["killed_run_differs_in"]
    stopped = config_of(url, folder, "stopped", num_quanta)
    result |= run_with_sigterm(stopped, size)
    result["stopped_run_differs_in"] = differences(stopped, reference)
    result["sigterm_resume_bitwise_equal"] = not result["stopped_run_differs_in"]
    return result | reshard(url, folder, 20 if quick else 30, (1,) if quick else (1, 2, 3))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
