"""Plain values that the rooms are given, computed from a run's config: pure functions, and the same on every rank."""

from collections.abc import Iterator
from functools import partial

import torch

from nltrain.config import RunConfig, to_dict
from nltrain.evaluate.protocol import Setting
from nltrain.levels.quantum import cut_quantum
from nltrain.model import arrange
from nltrain.track.record import RunFacts


def total_tokens(config: RunConfig) -> int:
    """T at the end of the run: a whole number of quanta."""
    return config.num_quanta * config.quantum_tokens


def cut_of(config: RunConfig, world_size: int) -> list[list[range]]:
    """The micro-steps of a quantum: for each, the range of its sequences that every rank takes."""
    num_sequences = config.quantum_tokens // config.data.seq_len
    return cut_quantum(num_sequences, config.train.micro_batch_size, world_size)


def samples_of(config: RunConfig, tokens: int, rank: int, world_size: int) -> Iterator[range]:
    """Global sample indices of each micro-batch of `rank` from T = `tokens` to the end of the run."""
    per_quantum = config.quantum_tokens // config.data.seq_len
    cut = cut_of(config, world_size)
    for quantum in range(tokens // config.quantum_tokens, config.num_quanta):
        first = quantum * per_quantum
        for step in cut:
            yield range(first + step[rank].start, first + step[rank].stop)


def evaluation_setting(config: RunConfig, rank: int, world_size: int, device: torch.device) -> Setting:
    """What the evaluations of the run are made of."""
    return Setting(
        data=config.data,
        num_sequences=config.train.validation_sequences,
        micro_batch_size=config.train.micro_batch_size,
        every_tokens=config.train.validate_every_tokens,
        quantum_tokens=config.quantum_tokens,
        total_tokens=total_tokens(config),
        reference_max_tokens=config.train.reference_max_tokens,
        rank=rank,
        world_size=world_size,
        device=device,
        arrange=partial(arrange, config.model),
    )


def run_facts(config: RunConfig) -> RunFacts:
    """What the records say of the run."""
    return RunFacts(config.name, config.output, config.checkpoint.url, total_tokens(config), to_dict(config))
