"""Device memory of a training step of the 1.3B job, per choice of recomputation, counted on the meta device.

    python -m benchmarks.memory [--json] [--quick]

A dispatch mode follows every storage from the operation that makes it to the moment it is freed, through the forward
and backward pass of the job's own model, in bf16, on packed documents. That is what an allocator without fragmentation
would hold. One layer and two layers are run; all layers follow, because each further layer adds the same. Weights,
gradients, fp32 sums and the optimizer's shards come from the plan of the job (`nltrain.plan`). Nothing is measured on a
GPU: kernels that keep less than the chunk loop, and fragmentation, are not in the figures; RESERVE_BYTES stands for
the context of the driver, NCCL's buffers and fragmentation.
"""

import argparse
import json
import sys
import time
import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from jobs.hope_1p3b import config as JOB
from nltrain.levels.split import split_levels
from nltrain.model import ModelConfig, arrange, build
from nltrain.plan import level_bytes

CHOICES = ("none", "chunks", "block")
MICRO_BATCHES = (2, 4)
CARD_BYTES = 80 * 10**9
RESERVE_BYTES = 4 * 10**9
MEAN_DOCUMENT_TOKENS = 700


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations under it have made and that are still alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[weakref.ref[Any], int] = {}
        self._ours: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages of its results that are new."""
        before = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._ours:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()

        def freed(reference: weakref.ref[Any]) -> None:
            self.now -= self._alive.pop(reference)
            self._ours.discard(key)

        self._alive[weakref.ref(storage, freed)] = num_bytes
        self._ours.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Step:
    """Bytes of one micro-step, weights not included."""

    kept: int
    """alive after the forward pass: what the backward pass needs"""
    peak: int
    """at most alive during both"""


def packed(micro_batch: int, num_tokens: int) -> Tensor:
    """[B, T] bool: documents of exponentially distributed lengths."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(micro_batch, num_tokens, generator=generator) < 1 / MEAN_DOCUMENT_TOKENS
    starts[:, 0] = True
    return starts


def micro_step(config: ModelConfig, micro_batch: int, num_tokens: int) -> Step:
    """Forward and backward of the model on the meta device; gradients leave their parameter as in a level's window."""

    def leave(parameter: Tensor) -> None:
        parameter.grad = None

    with torch.device("meta"):
        model = build(config).to(torch.bfloat16)
        tokens = torch.zeros(micro_batch, num_tokens, dtype=torch.long)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(leave)
    documents = arrange(config, packed(micro_batch, num_tokens)).to("meta")
    with LiveBytes() as live:
        loss = model.loss(tokens, tokens, documents)
        kept = live.now
        loss.backward()
    return Step(kept, live.peak)


@dataclass
class Row:
    """One choice of recomputation at one micro-batch."""

    recompute: str
    micro_batch: int
    kept_gb_per_layer: float
    """activations kept for the backward pass of one layer"""
    peak_gb_one_layer: float
    """at most alive in a model of one layer, logits included"""
    activations_gb: float
    """at most alive with all layers"""
    state_gb: float
    """weights, gradients, sums, masters, moments of one rank, from the plan"""
    total_gb: float
    """both, and the reserve"""
    fits_80gb: bool


def state_bytes() -> int:
    """What one rank of the job holds between steps, and its gradients at the end of a backward pass."""
    with torch.device("meta"):
        parts = split_levels(build(JOB.model), JOB.levels.resolved())
    ranks = JOB.cluster.max_workers
    return sum(level_bytes(part, 2, ranks, JOB.levels.measure_changes).total for part in parts)


def row(recompute: str, micro_batch: int, num_tokens: int, state: int) -> Row:
    """Counts one layer and two; each further layer adds what the second did."""
    config = replace(JOB.model, recompute=recompute)
    one, two = (micro_step(replace(config, num_layers=n), micro_batch, num_tokens) for n in (1, 2))
    activations = one.peak + (config.num_layers - 1) * (two.peak - one.peak)
    total = activations + state + RESERVE_BYTES
    figures = (two.kept - one.kept, one.peak, activations, state, total)
    return Row(recompute, micro_batch, *(round(x / 1e9, 2) for x in figures), total <= CARD_BYTES)


def largest_that_fits(rows: list[Row]) -> int:
    """The largest micro-batch whose activations fit beside the state; they grow in proportion to it."""
    first, last = rows[0], rows[-1]
    per_sequence = (last.activations_gb - first.activations_gb) / (last.micro_batch - first.micro_batch)
    constant = last.total_gb - per_sequence * last.micro_batch
    return max(0, int((CARD_BYTES / 1e9 - constant) / per_sequence))


def micro_batch_that_fits_80gb() -> int:
    """Of the job with recompute = "block", at its own length of sequences: half a minute of one core."""
    state = state_bytes()
    return largest_that_fits([row("block", micro_batch, JOB.data.seq_len, state) for micro_batch in MICRO_BATCHES])


def main() -> None:
    """Prints the table; with --json one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="sequences of 512 tokens: proves the machinery")
    args = parser.parse_args()
    num_tokens = 512 if args.quick else JOB.data.seq_len
    state, rows = state_bytes(), []
    print(f"1.3B, T = {num_tokens:,}, bf16, {JOB.cluster.max_workers} ranks, packed documents; GB = 10^9 bytes")
    print("recompute  micro-batch  kept/layer  peak, 1 layer  activations   state   total  fits 80 GB")
    for recompute in CHOICES:
        for micro_batch in MICRO_BATCHES:
            found = row(recompute, micro_batch, num_tokens, state)
            rows.append(found)
            print(
                f"{recompute:9}  {micro_batch:11}  {found.kept_gb_per_layer:10.2f}  {found.peak_gb_one_layer:13.2f}  "
                f"{found.activations_gb:11.2f}  {found.state_gb:6.2f}  {found.total_gb:6.2f}  {found.fits_80gb}",
                flush=True,
            )
    fits = {choice: largest_that_fits([r for r in rows if r.recompute == choice]) for choice in CHOICES}
    print(f"largest micro-batch that fits: {fits}")
    if args.json:
        results = {
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "seq_len": num_tokens,
            "reserve_gb": RESERVE_BYTES / 1e9,
            "rows": [asdict(found) for found in rows],
            "largest_micro_batch": fits,
            "micro_batch_that_fits_80gb": fits["block"],
        }
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
