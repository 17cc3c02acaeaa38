"""Does a slow clock cost quality? Hope tiny, CMS periods 1 : 4 : 16 against all levels at every step, held-out loss.

    python -m benchmarks.level_quality [--json] [--quick] [--steps N] [--seeds N] [--jobs N] [--folder FOLDER]

Three variants on several seeds, bytes of the running Python's standard library in sequences of 1,024: `uniform` ticks
every level at every base step, `periods` ticks them 1 : 4 : 16, `last_only` ticks like `periods` but keeps only the
last base step's gradient of each window. A level of period p learns at sqrt(p) times the base's rate, as a mean of p
gradients is that much less noisy: what accumulation buys. Claims: `periods` is no worse than `uniform` by more than
the seeds spread, and `last_only` is worse than `periods`, so the accumulation is real. Runs save themselves to FOLDER
and go on from there when started again. --quick takes a few steps of one seed to show that the runs work; it judges
nothing.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._runs import Run, run_all, settings_of
from nltrain.checkpoint import CheckpointConfig, Checkpointer
from nltrain.data.prepare.corpus import stdlib_corpus
from nltrain.fragment import Fragment
from nltrain.levels.config import LevelConfig, LevelsConfig, ScheduleConfig
from nltrain.levels.scheduler import LevelScheduler
from nltrain.model import LanguageModel, ModelConfig, build, preset
from nltrain.store import open_store

PERIODS = {"base": 1, "fast": 1, "mid": 4, "slow": 16}  # base steps
VARIANTS = ("uniform", "periods", "last_only")
SEQ_LEN, NUM_SEQUENCES, NUM_HELD_OUT = 1024, 2, 48
QUANTUM = SEQ_LEN * NUM_SEQUENCES
BASE_LR, PERIOD_EXPONENT = 4e-3, 0.5  # a level's peak rate is BASE_LR * period^PERIOD_EXPONENT
CORPUS_BYTES = 4_000_000
SAVE_EVERY = 40  # base steps


@dataclass(frozen=True)
class Trial:
    """One training run."""

    variant: str
    seed: int
    num_steps: int

    @property
    def name(self) -> str:
        """Name of its file and of its checkpoints."""
        return f"{self.variant}-seed{self.seed}-{self.num_steps}"


class Corpus:
    """Byte sequences of the standard library; the last twentieth is held out."""

    def __init__(self) -> None:
        text = "\n".join(document.text for document in stdlib_corpus(CORPUS_BYTES))
        self.bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.num_training = len(self.bytes) * 19 // 20

    def _cut(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.bytes[starts[:, None] + torch.arange(SEQ_LEN + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of base step `step`: a pure function of the seed and the step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._cut(torch.randint(0, self.num_training - SEQ_LEN - 1, (NUM_SEQUENCES,), generator=generator))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets of NUM_HELD_OUT held-out sequences, always the same."""
        generator = torch.Generator().manual_seed(0)
        last = len(self.bytes) - SEQ_LEN - 1
        return self._cut(torch.randint(self.num_training, last, (NUM_HELD_OUT,), generator=generator))


def model_config() -> ModelConfig:
    """One layer of Hope tiny over bytes; chunks of 64, so that a sequence holds 16 of them."""
    return replace(preset("hope", "tiny"), vocab_size=256, num_layers=1)


def model_of(seed: int) -> LanguageModel:
    """The model with the initial weights of one seed."""
    torch.manual_seed(seed)
    return build(model_config())


def levels_of(trial: Trial, model: LanguageModel) -> LevelsConfig:
    """The clocks and learning rates of a trial."""
    patterns = model.config.level_patterns()
    made = []
    for name, period in PERIODS.items():
        steps = 1 if trial.variant == "uniform" else period
        lr = BASE_LR * steps**PERIOD_EXPONENT
        made.append(LevelConfig(name, patterns.get(name, ("rest",)), steps * QUANTUM, lr=lr, weight_decay=0.1))
    schedule = ScheduleConfig(
        "cosine",
        warmup_tokens=trial.num_steps // 20 * QUANTUM,
        total_tokens=trial.num_steps * QUANTUM,
        min_lr_fraction=0.1,
    )
    return LevelsConfig(tuple(made), QUANTUM, schedule, fold_every_tokens=SAVE_EVERY * QUANTUM)


@torch.no_grad()
def held_out_loss(model: LanguageModel, corpus: Corpus) -> float:
    """Nats per byte."""
    tokens, targets = corpus.held_out()
    pairs = zip(tokens.split(NUM_SEQUENCES), targets.split(NUM_SEQUENCES), strict=True)
    return sum(model.loss(x, y).item() for x, y in pairs) / targets.numel()


def train(trial: Trial, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Trains from where the last call left off."""
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = model_of(trial.seed)
    scheduler = LevelScheduler(model, levels_of(trial, model), SEQ_LEN)
    saves = CheckpointConfig(url=str(folder), every_tokens=SAVE_EVERY * QUANTUM, keep_last=1)
    checkpointer = Checkpointer(open_store(saves.url), trial.name, None, saves)

    def saved_with(state: Mapping[str, Any]) -> dict[str, Fragment]:
        scheduler.prepare_to_load(state["levels"])
        return scheduler.fragments()

    loaded = checkpointer.resume(saved_with)
    if loaded is not None:
        scheduler.load(loaded.state["levels"], [loaded.rank_state] if loaded.rank_state else [])
    started_s, first = time.perf_counter(), scheduler.tokens // QUANTUM
    for step in range(first, trial.num_steps):
        if trial.variant == "last_only":
            for name, clock in scheduler.clocks.items():
                if clock.due(step * QUANTUM, (step + 1) * QUANTUM):
                    scheduler.discard_window(name)
        tokens, targets = corpus.batch(trial.seed, step)
        scheduler.start_micro_step()
        scheduler.backward(model.loss(tokens, targets), targets.numel())
        scheduler.finish_quantum()
        if checkpointer.due(step * QUANTUM, scheduler.tokens):
            state = {"levels": scheduler.state_dict()}
            checkpointer.save(scheduler.tokens, scheduler.fragments(), state, scheduler.rank_state())
            done, left_s = step + 1 - first, time.perf_counter() - started_s
            left_s *= (trial.num_steps - step - 1) / done
            print(f"  {trial.name}: step {step + 1}/{trial.num_steps}, {left_s:.0f} s left", flush=True)
    checkpointer.wait()
    result = {"loss": held_out_loss(model, corpus), "counts": scheduler.counts}
    scheduler.close()
    dist.destroy_process_group()
    return result


def judge(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Means over seeds; differences are paired by seed, because a seed fixes weights and data."""
    mean = {variant: statistics.mean(values) for variant, values in losses.items()}
    spread = max(losses["uniform"]) - min(losses["uniform"])
    worse = [last - periods for last, periods in zip(losses["last_only"], losses["periods"], strict=True)]
    error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else None
    return {
        "held_out_nats_per_byte": losses,
        "mean": mean,
        "seed_spread": spread,
        "periods_minus_uniform": mean["periods"] - mean["uniform"],
        "last_only_minus_periods": statistics.mean(worse),
        "last_only_standard_error": error,
    }


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed; judges nothing")
    parser.add_argument("--folder", type=Path, default=Path("runs/level_quality"), help="where runs keep themselves")
    parser.add_argument("--steps", type=int, default=320, help="base steps per run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    arguments = parser.parse_args()
    steps, num_seeds = (24, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    torch.set_num_threads(1)
    corpus = Corpus()
    trials = [Trial(variant, seed, steps) for seed in range(num_seeds) for variant in VARIANTS]
    settings = {
        "model": settings_of(model_config()),
        "steps": steps,
        "base_lr": BASE_LR,
        "period_exponent": PERIOD_EXPONENT,
    }
    runs = [Run(t.name, settings, partial(train, t, corpus, arguments.folder)) for t in trials]
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for trial, result in zip(trials, run_all(arguments.folder, runs, arguments.jobs), strict=True):
        ticks = " ".join(f"{name} {count['done']}" for name, count in result["counts"].items())
        print(f"seed {trial.seed} {trial.variant:<10} {result['loss']:.4f} nats per byte; ticks: {ticks}", flush=True)
        losses[trial.variant].append(result["loss"])
    verdict = judge(losses)
    no_worse = verdict["periods_minus_uniform"] <= verdict["seed_spread"]
    error = verdict["last_only_standard_error"]
    real = error is not None and verdict["last_only_minus_periods"] > 2 * error
    print(f"periods - uniform: {verdict['periods_minus_uniform']:+.4f} (seeds spread {verdict['seed_spread']:.4f})")
    print(
        f"last_only - periods: {verdict['last_only_minus_periods']:+.4f}"
        + ("" if error is None else f" (standard error of the paired difference {error:.4f})")
    )
    if arguments.quick:
        print("quick: the runs work; too short to judge")
    elif not (no_worse and real):
        print(
            "FALLS SHORT: " + "; ".join(["slow clocks cost quality"] * (not no_worse) + ["accumulation"] * (not real))
        )
    if arguments.json:
        print(json.dumps(verdict | {"judged": not arguments.quick}))
    return 0 if arguments.quick or (no_worse and real) else 1


if __name__ == "__main__":
    sys.exit(main())
