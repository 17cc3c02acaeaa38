"""Long comparisons as many small runs: each variant and seed is one JSON file, made once and then only read.

A run's file is named after its variant and seed and holds its settings; a file made with other settings is refused,
not overwritten. Several processes may work on one folder: a run is claimed by creating its file's lock.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nltrain.model import LanguageModel


class BenchmarkError(Exception):
    """A benchmark cannot go on; the message says what to do."""


def run_once(folder: Path, name: str, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, from folder/name.json if it is there, else made now and written atomically."""
    path = folder / f"{name}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != json.loads(json.dumps(settings)):
            raise BenchmarkError(f"{path} was made with other settings: move it away or choose another --out folder")
        print(f"{name}: read from {path}", flush=True)
        return found["result"]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result = work()
    result["wall_s"] = round(time.monotonic() - began, 1)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"settings": settings, "result": result, "torch": torch.__version__}, indent=1))
    os.replace(partial, path)
    print(f"{name}: {result}", flush=True)
    return result


def train(
    model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], num_steps: int, lr: float, *,
    weight_decay: float = 0.1, on_step: Callable[[int, float], bool] | None = None,
) -> float:  # fmt: skip
    """AdamW, 5 % warm-up and cosine to a tenth, clip 1, no decay on memories; the mean loss of the last tenth.

    on_step(step, loss) may stop the training by returning True.
    """
    memories = [p for n, p in model.named_parameters() if ".memories." in n or p.dim() < 2]
    held = {id(p) for p in memories}
    others = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": memories, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(num_steps):
        warm = min(1.0, (step + 1) / max(1, num_steps // 20))
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
        if on_step is not None and on_step(step, losses[-1]):
            break
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def count_parameters(model: LanguageModel) -> int:
    """Parameters, the tied embedding once."""
    return sum(p.numel() for p in model.parameters())
