"""Small language models on Python's standard library: Hope, its controls, its ablations and its rivals, 3 seeds each.

    python -m benchmarks.small_lm [--json] [--quick] [--only NAME ...] [--seeds N] [--steps N] [--jobs N] [--out DIR]
                                [--page FILE]

Bytes as tokens, so that torch is all it needs. Every model of a comparison sees the same batches in the same order and
has the same parameters within 2 % (the feed-forward width evens them out). Each variant and seed is a run that writes
its JSON under --out and is skipped when it is there; --page writes a dated page from them. All runs together take
hours; --quick trains every variant for a few steps in a temporary folder to prove the machinery.
"""

import argparse
import json
import math
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from benchmarks._runs import Run, count_parameters, run_all, settings_of, train
from nltrain.model import ModelConfig, build, preset

VOCAB, SEQ_LEN, BATCH = 256, 256, 8
GENERATED = ("k", "v", "eta", "alpha")


def variants() -> dict[str, ModelConfig]:
    """Every compared model; the first is the one they are compared with."""
    size = {"vocab_size": VOCAB, "width": 128, "num_layers": 2, "head_dim": 32, "memory_hidden": 32}
    hope = replace(preset("hope", "tiny"), **size)
    rule = hope.rule
    configs = {
        "hope": hope,
        "hope, writes off": replace(hope, rule=replace(rule, writes=False)),
        "transformer++ with conv": replace(preset("transformer", "tiny"), **size, conv_width=4),
        "without CMS": replace(hope, levels=("ffn",)),
        "without DGD (lambda_d = 0)": replace(hope, rule=replace(rule, lambda_d=0.0)),
        "static k": replace(hope, rule=replace(rule, adaptive=tuple(n for n in GENERATED if n != "k"))),
        "static v": replace(hope, rule=replace(rule, adaptive=tuple(n for n in GENERATED if n != "v"))),
        "without decay": replace(hope, alpha_init=1 - 1e-6),
        "with momentum": replace(hope, rule=replace(rule, momentum=True)),
        "titans": replace(preset("titans", "tiny"), **size),
        "hope-attention": replace(preset("hope_attention", "tiny"), **size),
        "transformer++": replace(preset("transformer", "tiny"), **size),
        "matrix memory": replace(preset("matrix", "tiny"), **size),
    }
    goal = _parameters(hope)
    return {name: _evened(config, goal) for name, config in configs.items()}


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return count_parameters(build(config))


def _evened(config: ModelConfig, goal: int) -> ModelConfig:
    """The config with the feed-forward width that brings its parameters nearest to `goal`."""
    field = "ffn_hidden" if config.family == "transformer" else "cms_hidden"
    now = config.swiglu_hidden if field == "ffn_hidden" else config.cms_total
    per_unit = config.num_layers * config.width * (3 if field == "ffn_hidden" else 2)
    return replace(config, **{field: now + round((goal - _parameters(config)) / per_unit)})


def corpus(max_bytes: int) -> tuple[Tensor, Tensor]:
    """Training and validation bytes: whole files in the order of their names, every 20th file for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")) if "site-packages" not in p.parts]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        parts[i % 20 == 7].append(path.read_bytes())
        if sum(map(len, parts[0])) > max_bytes:
            break
    train_bytes, val_bytes = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8).long() for p in parts)
    return train_bytes[:max_bytes], val_bytes


def unigram_entropy(train_bytes: Tensor, val_bytes: Tensor) -> float:
    """Validation loss of counting alone, nats per byte."""
    counts = torch.bincount(train_bytes, minlength=VOCAB).double() + 1
    return -(counts / counts.sum()).log()[val_bytes].mean().item()


def batches(data: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows; the same for every model of one seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(0, len(data) - SEQ_LEN - 1, (BATCH,), generator=generator)
        windows = torch.stack([data[i : i + SEQ_LEN + 1] for i in at.tolist()])
        yield windows[:, :-1], windows[:, 1:]


def validation_loss(model: torch.nn.Module, data: Tensor, num_windows: int) -> float:
    """Nats per byte over evenly spaced windows."""
    step = max(1, (len(data) - SEQ_LEN - 1) // num_windows)
    windows = torch.stack([data[i * step : i * step + SEQ_LEN + 1] for i in range(num_windows)])
    with torch.no_grad():
        total = sum(model.loss(w[:, :-1], w[:, 1:]).item() for w in windows.split(BATCH))
    return total / (num_windows * SEQ_LEN)


def one_run(
    config: ModelConfig, seed: int, num_steps: int, lr: float, data: tuple[Tensor, Tensor], windows: int
) -> dict:
    """Trains one model and evaluates it."""
    torch.manual_seed(seed)
    model = build(config)
    train_loss = train(model, batches(data[0], seed), num_steps, lr)
    return {
        "val_loss": validation_loss(model, data[1], windows),
        "train_loss": train_loss,
        "params": count_parameters(model),
        "tokens": num_steps * BATCH * SEQ_LEN,
    }


def page(summary: dict, entropy: float, args: argparse.Namespace) -> str:
    """The dated page."""
    lines = [
        f"# Small language models, {date.today().isoformat()}",
        "",
        f"Python's standard library as bytes, {args.steps} steps of {BATCH} x {SEQ_LEN}, AdamW lr {args.lr:g}, seeds "
        f"0-{args.seeds - 1}, torch {torch.__version__} on CPU. Unigram entropy {entropy:.4f} nats per byte.",
        "Made by `python -m benchmarks.small_lm`.",
        "",
        "| model | validation loss, nats per byte | spread | parameters | tokens |",
        "|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        spread = "-" if row["val_loss_std"] is None else f"{row['val_loss_std']:.4f}"
        lines.append(f"| {name} | {row['val_loss_mean']:.4f} | {spread} | {row['params']:,} | {row['tokens']:,} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a few steps of every variant, nothing kept")
    parser.add_argument("--only", nargs="+", help="names of variants, as in the table")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps per run")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate, the same for all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/small_lm"), help="folder of the runs' JSON")
    parser.add_argument("--page", type=Path, help="write the page here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = variants()
    unknown = set(args.only or ()) - set(configs)
    if unknown:
        parser.error(f"--only {sorted(unknown)}: choose from {', '.join(configs)}")
    scratch = tempfile.TemporaryDirectory()
    if args.quick:
        args.steps, args.seeds, args.out = 3, 1, Path(scratch.name)
    data = corpus(200_000 if args.quick else 8_000_000)
    windows = 8 if args.quick else 256
    entropy = unigram_entropy(*data)

    runs = []
    for name in args.only or configs:
        for seed in range(args.seeds):
            settings = {"model": settings_of(configs[name]), "seed": seed, "steps": args.steps, "lr": args.lr,
                        "train_bytes": len(data[0]), "windows": windows}  # fmt: skip
            slug = f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"
            work = partial(one_run, configs[name], seed, args.steps, args.lr, data, windows)
            runs.append(Run(slug, settings, work))
    results = iter(run_all(args.out, runs, args.jobs))

    summary: dict[str, dict] = {}
    for name in args.only or configs:
        rows = [next(results) for _ in range(args.seeds)]
        losses = [row["val_loss"] for row in rows]
        summary[name] = {
            "val_loss_mean": mean(losses),
            "val_loss_std": stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None,
            "params": rows[0]["params"],
            "tokens": rows[0]["tokens"],
        }
    text = page(summary, entropy, args)
    print(text)
    if args.page:
        args.page.write_text(text)
    goal = _parameters(configs["hope"])
    missed = [n for n, r in summary.items() if not math.isfinite(r["val_loss_mean"])]
    missed += [f"{n}: parameters" for n, r in summary.items() if abs(r["params"] / goal - 1) > 0.02]
    if not args.quick and "hope" in summary and summary["hope"]["val_loss_mean"] >= entropy:
        missed.append("hope: not below the unigram entropy")
    if args.json:
        print(json.dumps({"models": summary, "unigram_entropy": entropy, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
