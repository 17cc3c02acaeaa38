"""Runs test cases on real gloo processes: one spawn per world size runs all its cases, results come back by name.

A case is a function (Ranks) -> picklable result of rank 0. It may save to and load from `Ranks.folder`, which all world
sizes of a session share.
"""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import _forked as forked


@dataclass(frozen=True)
class Ranks:
    """Where a case runs."""

    rank: int
    world_size: int
    folder: Path


Case = Callable[[Ranks], Any]


class CaseFailed(AssertionError):
    """A case raised on some rank; carries that rank's traceback."""


def _work(
    rank: int, environment: dict[str, str], world_size: int, cases: dict[str, Case], folder: Path, here: Path
) -> None:
    forked.begin(environment | {"LOCAL_RANK": "0"})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{here}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    for name, case in cases.items():
        try:
            outcome: tuple[bool, Any] = (True, case(Ranks(rank, world_size, folder)))
        except BaseException:
            outcome = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        if rank == 0 or not outcome[0]:
            (here / f"{name}.{rank}").write_bytes(pickle.dumps(outcome))
        if not outcome[0]:
            os._exit(1)  # the other ranks may be inside a collective: end the spawn
    dist.barrier()
    dist.destroy_process_group()


def run_cases(world_size: int, cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Results by case name; a case that did not finish is a CaseFailed in its place."""
    with tempfile.TemporaryDirectory() as temporary:
        here, ended = Path(temporary), ""
        try:
            arguments = (forked.environment(), world_size, cases, folder, here)
            mp.start_processes(_work, arguments, nprocs=world_size, start_method=forked.METHOD)
        except Exception as error:
            ended = str(error)
        results: dict[str, Any] = {}
        for name in cases:
            outcomes = [pickle.loads(path.read_bytes()) for path in sorted(here.glob(f"{name}.*"))]
            failed = [text for ok, text in outcomes if not ok]
            if failed or not outcomes:
                results[name] = CaseFailed(failed[0] if failed else f"did not run: {ended}")
            else:
                results[name] = outcomes[0][1]
        return results
