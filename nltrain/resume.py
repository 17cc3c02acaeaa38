"""What changes where a run resumes from a checkpoint of other data or another schedule, and who takes over which state.

Pure functions of the checkpoint's state; each difference is one line for people and for the checkpoint's lineage.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from nltrain.checkpoint.load import Loaded
from nltrain.data.config import DataConfig
from nltrain.errors import ConfigError
from nltrain.levels.config import ScheduleConfig


def data_changes(state: Mapping[str, Any], data: DataConfig, fingerprint: str) -> list[str]:
    """One line where the data, or their order, are not those of `state`; `fingerprint` is that of the data of now."""
    before = state["dataset_fingerprint"]
    order = {name: (state["data"][name], getattr(data, name)) for name in ("seed", "window_shards")}
    words = [f"data.{name} {then} -> {now}" for name, (then, now) in order.items() if then != now]
    if before != fingerprint:
        urls = ", ".join(dataset["url"] for dataset in state["data"]["datasets"])
        words.insert(0, f"dataset {urls} ({before[:12]}) -> {data.prefix} ({fingerprint[:12]})")
    return [f"other data from {state['levels']['tokens']:,} tokens on: {', '.join(words)}"] if words else []


def schedule_changes(state: Mapping[str, Any], schedule: ScheduleConfig) -> list[str]:
    """One line where `schedule` is not that of `state`: what happens to the learning rates.

    Raises ConfigError where they change and schedule.extension is "refuse".
    """
    tokens = state["levels"]["tokens"]
    stored = ScheduleConfig(**state["config"]["levels"]["schedule"])
    if stored == schedule:
        return []
    kind, extension = schedule.kind, schedule.extension
    if (factors := schedule.change_at(tokens, stored)) is None:
        same = f"the lr factor, {schedule.factor(tokens):.4g} here, goes on as before"
        return [f"levels.schedule at {tokens:,} tokens: {same} (extension={extension})"]
    end = f", then {kind} to {schedule.min_lr_fraction:g} at {schedule.end_tokens:,} tokens"
    line = (
        f"levels.schedule at {tokens:,} tokens: the lr factor was {factors[0]:.4g} and now is {factors[1]:.4g}"
        f"{'' if kind == 'constant' or extension == 'flat' else end} (extension={extension})"
    )
    if extension == "refuse":
        raise ConfigError(
            f"{line}: set levels.schedule.extension=follow to take it, rewarm or flat with "
            f"levels.schedule.extends_tokens={stored.total_tokens}, or the schedule back"
        )
    return [line]


def saved_rank_states(loaded: Loaded, rank: int, world_size: int) -> list[dict[str, Any]]:
    """The saved ranks' own states that `rank` takes over: its own, or its share where the world size has changed."""
    if loaded.same_world_size:
        return [loaded.rank_state]
    return [loaded.stored.rank_state(saved) for saved in range(rank, loaded.manifest.world_size, world_size)]


def rank_seed(seed: int, rank: int, tokens: int = 0) -> int:
    """Seed of a rank's generators where none is restored: a new run, or T = `tokens` at another world size."""
    return (seed * 1_000_003 + rank) ^ tokens


def seed_all(seed: int) -> None:
    """Seed every generator whose state a checkpoint keeps."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
