"""Probes a rank's device before it trains: wrong results of matmuls, memory or an all-reduce are an error.

Results are compared with values that are known exactly: products and sums of small integers, which bf16 and fp32 hold
without rounding. No Ray; the reader of the driver is a parameter, so that each refusal is tested without a GPU.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nltrain.errors import UserError

# The oldest driver that runs a CUDA of this major version (NVIDIA's minor version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
MATMUL_SIZE = {"cpu": 128, "cuda": 4096}
BF16_INNER = 64  # terms of at most 4 each
CHECKED_ROWS = 16  # of the fp64 product, against integers on the CPU, which are slow
MATMUL_REPEATS = {"cpu": 1, "cuda": 8}
# Left free for other users of the card while its memory is probed.
MEMORY_RESERVE_BYTES = 2 << 30
MEMORY_CHUNK_BYTES = 1 << 30
CPU_MEMORY_BYTES = 4 << 20
LINK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


class DeviceRefusedError(UserError, RuntimeError):
    """This rank's device or driver gave a wrong answer: the rank must not train on it."""


class Link(NamedTuple):
    """An all-reduce over the whole group."""

    gb_per_s: float  # bytes that each rank sends and receives, 10^9 per second (nccl-tests' busbw)
    seconds: float


def read_driver() -> str:
    """Version of the NVIDIA driver, "580.65.06"; empty where there is none."""
    version = Path("/sys/module/nvidia/version")
    if version.exists():
        return version.read_text().strip()
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def driver_problem(driver: str, cuda: str | None) -> str:
    """One line where `driver` cannot run torch's `cuda` ("13.0"); empty where it can."""
    if cuda is None:
        return "torch is built for CPUs: install the wheel for CUDA (cluster/Dockerfile, TORCH_INDEX)"
    if not driver:
        return "no NVIDIA driver is to be seen: start the container with --gpus all, or install the driver on the host"
    major = int(cuda.partition(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        older = [f"cu{each}x" for each in OLDEST_DRIVER if OLDEST_DRIVER[each] <= int(driver.partition(".")[0])]
        wheel = f", or build the image with a TORCH_INDEX of {older[-1]}" if older else ""
        return f"driver {driver} is too old for torch's CUDA {cuda}: install R{oldest} or newer on the host{wheel}"
    return ""


def _integers(size: int, factor: int) -> torch.Tensor:
    """[size, size], entries -2..2, not symmetric, all rows different."""
    index = torch.arange(size, dtype=torch.int64)
    return (index[:, None] * factor + index[None, :] * index[None, :] + (index[:, None] >> 3)) % 5 - 2


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def probe_compute(device: torch.device, product: Product = torch.matmul) -> None:
    """Products of known integers in fp32 and bf16. Raises DeviceRefusedError where one differs in a single element.

    Exact whatever the order of summation, and so whatever kernel is chosen: sums of fp32 stay below 2^24, and those of
    bf16, which has 8 bits, below 2^8, partial ones included.
    """
    size = MATMUL_SIZE[device.type]
    for dtype, inner in ((torch.float32, size), (torch.bfloat16, BF16_INNER)):
        a, b = _integers(size, 7)[:, :inner], _integers(size, 3)[:inner]
        there = a.to(device), b.to(device)
        # On the device too, but by another way: fp64 units, no tensor cores.
        exact = (there[0].double() @ there[1].double()).cpu()
        if not torch.equal(exact[:CHECKED_ROWS].to(torch.int64), a[:CHECKED_ROWS] @ b):
            raise DeviceRefusedError(f"{_name(device)}: fp64 matmul of {size} x {inner} integers is wrong")
        for _ in range(MATMUL_REPEATS[device.type]):
            wrong = int((product(there[0].to(dtype), there[1].to(dtype)).cpu() != exact.to(dtype)).sum())
            if wrong:
                raise DeviceRefusedError(
                    f"{_name(device)}: {wrong} elements of a {size} x {size} matmul in {dtype} are wrong"
                )


def probe_memory(device: torch.device, readback: Callable[[torch.Tensor], torch.Tensor] = lambda held: held) -> int:
    """Write two patterns to the free memory and read them. Returns the bytes probed; raises DeviceRefusedError."""
    free = torch.cuda.mem_get_info(device)[0] - MEMORY_RESERVE_BYTES if device.type == "cuda" else CPU_MEMORY_BYTES
    sizes = [min(MEMORY_CHUNK_BYTES, free - start) for start in range(0, max(0, free), MEMORY_CHUNK_BYTES)]
    held = [torch.empty(size // 8, dtype=torch.int64, device=device) for size in sizes]
    for pattern in (0x5555555555555555, -0x5555555555555556):
        for index, chunk in enumerate(held):
            chunk.fill_(pattern ^ index)
        for index, chunk in enumerate(held):
            wrong = int((readback(chunk) != pattern ^ index).sum())
            if wrong:
                raise DeviceRefusedError(
                    f"{_name(device)}: {wrong} words of 8 bytes in its memory do not keep a pattern"
                )
    del held
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sum(sizes)


def probe_link(device: torch.device, reduce: Callable[[torch.Tensor], object] = dist.all_reduce) -> Link:
    """One all-reduce of known integers over the default group. Collective; raises DeviceRefusedError on every rank
    that got a wrong sum."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numel = LINK_BYTES[device.type] // 4
    pattern = torch.arange(numel, device=device) % 97
    expected = (world_size * pattern + world_size * (world_size - 1) // 2).float()
    seconds = 0.0
    for _ in range(2):  # the first one makes the connections
        values = (pattern + rank).float()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.monotonic()
        reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - started_s
        wrong = int((values != expected).sum())
        if wrong:
            raise DeviceRefusedError(
                f"{_name(device)}: {wrong} elements of an all-reduce over {world_size} ranks are wrong"
            )
    sent = 4 * numel * 2 * (world_size - 1) / world_size
    return Link(sent / max(seconds, 1e-9) / 1e9, seconds)


def probe(device: torch.device, driver: Callable[[], str] = read_driver) -> str:
    """Probe driver, matmul and memory of one rank; returns a line for the log. Raises DeviceRefusedError."""
    started_s = time.monotonic()
    if device.type == "cuda" and (problem := driver_problem(driver(), torch.version.cuda)):
        raise DeviceRefusedError(problem)
    probe_compute(device)
    num_bytes = probe_memory(device)
    return (
        f"{_name(device)}: matmul and {num_bytes / 2**30:.1f} GiB of memory right, {time.monotonic() - started_s:.1f} s"
    )


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
