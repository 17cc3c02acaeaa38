"""Do the default memories stay finite after training, on sequences four times as long as in training?

    python -m benchmarks.stability [--json] [--quick] [--jobs N] [--out DIR]

One layer, chunks of 1, 16, 64 and 256 tokens: 2,000 small steps on bytes of Python's standard library, then one
sequence of at least 4,096 tokens and 32 chunks, at least four times the training length. Each chunk length is a run
that writes its JSON under --out and is skipped when it is there. The exit code is 1 when a figure is not finite, the
memories drift further than BOUND from their initial state, or the loss rises behind the training length.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks._runs import Run, run_all, settings_of, train
from benchmarks.small_lm import VOCAB, corpus
from kernels import MemoryRule
from nltrain.model import ModelConfig, build, preset

# Chunk: training length. At least eight chunks where a step stays affordable.
LENGTHS = {1: 32, 16: 128, 64: 512, 256: 2048}
TOKENS_PER_STEP = 2048
BOUND = 1.0


def config_of(chunk: int) -> ModelConfig:
    """One layer with the default rule at this chunk length."""
    return replace(
        preset("hope", "tiny"), vocab_size=VOCAB, width=32, head_dim=32, memory_hidden=32, num_layers=1, cms_hidden=128,
        rule=MemoryRule(chunk_mem=chunk, chunk_other=chunk),
    )  # fmt: skip


def one_run(chunk: int, num_steps: int, test_tokens: int) -> dict:
    """Trains, then reads one long sequence."""
    torch.manual_seed(0)
    model, (data, held_out) = build(config_of(chunk)), corpus(2_000_000)
    length = LENGTHS[chunk]
    generator = torch.Generator().manual_seed(0)

    def windows():
        while True:
            at = torch.randint(0, len(data) - length - 1, (TOKENS_PER_STEP // length,), generator=generator)
            batch = torch.stack([data[i : i + length + 1] for i in at.tolist()])
            yield batch[:, :-1], batch[:, 1:]

    loss = train(model, windows(), num_steps, lr=3e-3)
    tokens = held_out[None, : test_tokens + 1]
    with torch.no_grad():
        logits = model(tokens[:, :-1])[0]
    nll = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
    (figures,) = model.diagnostics(tokens[:, : min(test_tokens, 4096 if chunk > 1 else 64)])
    return {
        "train_loss": loss,
        "train_length": length,
        "test_length": test_tokens,
        "loss_within_train_length": nll[:length].mean().item(),
        "loss_in_last_quarter": nll[-test_tokens // 4 :].mean().item(),
        "finite": bool(nll.isfinite().all()),
        **{f"{name}_worst": (v.min() if "min" in name else v.max()).item() for name, v in figures.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="two steps per chunk length, nothing kept")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/stability"), help="folder of the runs' JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory()
    if args.quick:
        args.steps, args.out = 2, Path(scratch.name)
    runs = []
    for chunk, length in LENGTHS.items():
        test_tokens = max(1024 if args.quick else 4096, 32 * chunk if not args.quick else 0, 4 * length)
        settings = {"model": settings_of(config_of(chunk)), "steps": args.steps, "test_tokens": test_tokens}
        runs.append(Run(f"chunk-{chunk}", settings, partial(one_run, chunk, args.steps, test_tokens)))
    results: dict[str, dict] = {}
    missed = []
    for chunk, result in zip(LENGTHS, run_all(args.out, runs, args.jobs), strict=True):
        results[str(chunk)] = result
        if not result["finite"] or not result["change_over_weight_worst"] < BOUND:
            missed.append(f"chunk {chunk}: not bounded")
        if not args.quick and result["loss_in_last_quarter"] > result["train_loss"] + 0.5:
            missed.append(f"chunk {chunk}: the loss rises behind the training length")
    if args.json:
        print(json.dumps({"chunks": results, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
