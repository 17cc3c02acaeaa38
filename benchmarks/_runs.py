"""Long comparisons as many small runs: each variant and seed is one JSON file, made once and then only read.

A run's file is named after its variant and seed and holds its settings; a file made with other settings is refused,
not overwritten. An interrupted comparison keeps its finished runs and loses those under way.
"""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nltrain.model import LanguageModel, ModelConfig
from nltrain.model.config import IMPLEMENTATION_FIELDS


class BenchmarkError(Exception):
    """A benchmark cannot go on; the message says what to do."""


class Run(NamedTuple):
    """One variant on one seed."""

    name: str  # of its file
    settings: dict[str, Any]  # what the result depends on
    work: Callable[[], dict[str, Any]]


def run_all(folder: Path, runs: Sequence[Run], num_jobs: int = 1) -> list[dict[str, Any]]:
    """The results of `runs`, in their order: those in folder/NAME.json are read, the others made, `num_jobs` at a time.

    Each is made in a process of its own, forked from this one, which must not have trained anything yet.

    Raises:
        BenchmarkError: a file was made with other settings, or a run ended without a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if _path(folder, run).exists():
            _read(folder, run)  # refuse at once, not after the hours that the others take
    waiting = [run for run in runs if not _path(folder, run).exists()]
    num_missing, under_way, done = len(waiting), {}, 0
    if waiting:
        print(f"{len(runs) - num_missing} of {len(runs)} runs found in {folder}", flush=True)
    began_s = time.monotonic()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < num_jobs:
                run = waiting.pop(0)
                process = multiprocessing.get_context("fork").Process(target=_make, args=(folder, run))
                process.start()
                under_way[process.sentinel] = run, process
            for sentinel in multiprocessing.connection.wait(list(under_way)):
                run, process = under_way.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise BenchmarkError(f"run {run.name} ended with exit code {process.exitcode}, its error is above")
                done += 1
                left_s = (time.monotonic() - began_s) / done * (num_missing - done)
                print(f"{done} of {num_missing} runs made, about {left_s / 60:.0f} min left", flush=True)
    finally:
        for _, process in under_way.values():
            process.terminate()
            process.join()
    return [_read(folder, run) for run in runs]


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """What a result depends on: the config, and what its rule derives, so that another default is noticed.

    Left out is what only decides which code computes the numbers: results agree within rounding.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in IMPLEMENTATION_FIELDS}
    return values | {"eta_limit": config.rule.eta_limit}


def _as_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a kept result; fields that are newer than it take the value they had in effect."""
    model = settings.get("model")
    if not isinstance(model, dict):
        return settings
    limit = {"eta_limit": model["eta_limit"]} if "eta_limit" in model else {}
    try:
        config = ModelConfig.from_saved({name: value for name, value in model.items() if name != "eta_limit"})
    except ValueError:  # fields that this release does not know: other settings
        return settings
    return settings | {"model": settings_of(config) | limit}


def _path(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.json"


def _read(folder: Path, run: Run) -> dict[str, Any]:
    path = _path(folder, run)
    found = json.loads(path.read_text())
    wanted = json.loads(json.dumps(run.settings))
    if found["settings"] != wanted and json.loads(json.dumps(_as_now(found["settings"]))) != wanted:
        raise BenchmarkError(f"{path} was made with other settings: move it away or choose another --out folder")
    return found["result"]


def _make(folder: Path, run: Run) -> None:
    """Works and keeps the result atomically."""
    path = _path(folder, run)
    began_s = time.monotonic()
    result = run.work()
    result["wall_s"] = round(time.monotonic() - began_s, 1)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"settings": run.settings, "result": result, "torch": torch.__version__}, indent=1))
    os.replace(partial, path)
    print(f"{run.name}: {result}", flush=True)


def train(
    model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], num_steps: int, lr: float, *,
    weight_decay: float = 0.1, warmup_steps: int | None = None, on_step: Callable[[int, float], bool] | None = None,
) -> float:  # fmt: skip
    """AdamW, warm-up (5 %) and cosine to a tenth, clip 1, no decay on memories; the mean loss of the last tenth, NaN as
    soon as one loss is not finite.

    on_step(step, loss) may stop the training by returning True.
    """
    memories = [p for n, p in model.named_parameters() if ".memories." in n or p.dim() < 2]
    held = {id(p) for p in memories}
    others = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": memories, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    warmup_steps = num_steps // 20 if warmup_steps is None else warmup_steps
    for step in range(num_steps):
        warm = min(1.0, (step + 1) / max(1, warmup_steps))
        factor = warm * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        tokens, targets = next(batches)
        loss = model.loss(tokens, targets) / (targets != -100).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):  # nothing that follows would be a number
            return math.nan
        if on_step is not None and on_step(step, losses[-1]):
            break
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def count_parameters(model: LanguageModel) -> int:
    """Parameters, the tied embedding once."""
    return sum(p.numel() for p in model.parameters())
