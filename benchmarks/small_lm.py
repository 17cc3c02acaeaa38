"""Small language models on Python's standard library: Hope, its controls, its ablations and its rivals.

    python -m benchmarks.small_lm [--json] [--quick] [--only NAME ...] [--seeds N] [--steps N] [--jobs N] [--out DIR]
                                [--no-compile] [--page FILE]

Bytes as tokens, sequences of 1,024, so that a chunk of 64 writes 15 times before the last one is read. Every model of a
comparison sees the same batches in the same order and has the same parameters within 2 % (the feed-forward width evens
them out); all of them start their feed-forward output sides from zero. Each model first runs a sweep of three learning
rates on a pilot seed that is in no figure (an ablation of Hope takes Hope's rate), then the seeds. Validation loss is
reported over all positions, over the first 256 and over the last half of them. Differences are paired by seed.

"transformer++ with conv, 3 x tokens" is the comparison at equal CPU time: its row says what time it took. Each run
writes its JSON under --out and is skipped when it is there; --page writes a dated page from them. All runs together
take hours; --quick trains every variant for a few steps in a temporary folder to prove the machinery.
"""

import argparse
import json
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._runs import Run, count_parameters, run_all, settings_of, train
from nltrain.model import ModelConfig, build, preset
from nltrain.model.config import ATTENTION_FAMILIES

VOCAB, SEQ_LEN, BATCH = 256, 1024, 2
FIRST, LAST = slice(0, 256), slice(SEQ_LEN // 2, None)  # positions
LRS, PILOT_SEED, PILOT_SHARE = (1.5e-3, 3e-3, 6e-3), 100, 0.5  # a pilot run has this share of a run's steps
GENERATED = ("k", "v", "eta", "alpha")
HOPE, WRITES_OFF, RIVAL = "hope", "hope, writes off", "transformer++ with conv"
RIVAL_EQUAL_TIME = "transformer++ with conv, 3 x tokens"


class Variant(NamedTuple):
    """A compared model."""

    config: ModelConfig
    rate_of: str
    """The variant whose sweep decides the learning rate."""
    steps_factor: int = 1
    """Training steps as a multiple of --steps."""


def variants() -> dict[str, Variant]:
    """Every compared model; the first is the one they are compared with."""
    size = {"vocab_size": VOCAB, "width": 128, "num_layers": 2, "head_dim": 32, "memory_hidden": 32}
    hope = replace(preset("hope", "tiny"), **size, cms_hidden=None)
    rule = hope.rule
    rival = replace(preset("transformer", "tiny"), **size, conv_width=4)
    # Without an erasure on W1 the stale gradients add up: these variants stay finite at a smaller step only.
    slow = 1 / 64
    ablations = {
        "without CMS": replace(hope, levels=("ffn",)),
        "without DGD (lambda_d = 0)": replace(hope, rule=replace(rule, lambda_d=0.0, eta_max=slow)),
        "erasure on keys alone": replace(hope, rule=replace(rule, layerwise_dgd=False, eta_max=slow)),
        "with momentum": replace(hope, rule=replace(rule, momentum=True)),
        "without decay": replace(hope, alpha_init=1 - 1e-6),
        "static k": replace(hope, rule=replace(rule, adaptive=tuple(n for n in GENERATED if n != "k"))),
        "static v": replace(hope, rule=replace(rule, adaptive=tuple(n for n in GENERATED if n != "v"))),
        "adaptive q": replace(hope, rule=replace(rule, adaptive=("k", "v", "q", "eta", "alpha"))),
        "silu levels": replace(hope, level_mlp="silu"),
    }
    rivals = {
        "transformer++": replace(rival, conv_width=0),
        "titans": replace(preset("titans", "tiny"), **size),
        "hope-attention": replace(preset("hope_attention", "tiny"), **size),
        "matrix memory": replace(preset("matrix", "tiny"), **size),
    }
    found = {
        HOPE: Variant(hope, HOPE),
        WRITES_OFF: Variant(replace(hope, rule=replace(rule, writes=False)), WRITES_OFF),
        RIVAL: Variant(rival, RIVAL),
        RIVAL_EQUAL_TIME: Variant(rival, RIVAL, 3),
    }
    found |= {name: Variant(config, HOPE) for name, config in ablations.items()}
    found |= {name: Variant(config, name) for name, config in rivals.items()}
    goal = _parameters(hope)
    return {name: v._replace(config=_evened(v.config, goal)) for name, v in found.items()}


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return count_parameters(build(config))


def _evened(config: ModelConfig, goal: int) -> ModelConfig:
    """The config with the feed-forward width that brings its parameters nearest to `goal`."""
    field = "ffn_hidden" if config.family == "transformer" else "cms_hidden"
    now = config.swiglu_hidden if field == "ffn_hidden" else config.cms_total
    matrices = 2 if field == "cms_hidden" and config.level_mlp == "silu" else 3
    per_unit = config.num_layers * config.width * matrices
    return replace(config, **{field: now + round((goal - _parameters(replace(config, **{field: now}))) / per_unit)})


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


def windows(data: Tensor, length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of `length` tokens, `batch` at a time; the same for every model of one seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + length + 1] for i in at.tolist()])
        yield rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validation_losses(model: torch.nn.Module, data: Tensor, num_windows: int, length: int = SEQ_LEN) -> Tensor:
    """Nats per byte at each position [length], over evenly spaced windows."""
    step = max(1, (len(data) - length - 1) // num_windows)
    rows = torch.stack([data[i * step : i * step + length + 1] for i in range(num_windows)])
    total = torch.zeros(length, dtype=torch.float64)
    for part in rows.split(BATCH):
        logits = model(part[:, :-1])[0].float()
        total += F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").sum(0)
    return total / num_windows


def one_run(
    config: ModelConfig, seed: int, num_steps: int, lr: float, data: tuple[Tensor, Tensor], num_windows: int,
    compiled: bool,
) -> dict:  # fmt: skip
    """Trains one model and evaluates it."""
    torch.manual_seed(seed)
    has_steps = config.family not in ATTENTION_FAMILIES
    model = build(replace(config, compile="steps") if compiled and has_steps else config)
    began_s = time.process_time()
    train_loss = train(model, windows(data[0], SEQ_LEN, BATCH, seed), num_steps, lr)
    trained_s = time.process_time() - began_s
    losses = validation_losses(model, data[1], num_windows)
    return {
        "val_loss": losses.mean().item(),
        "val_loss_first": losses[FIRST].mean().item(),
        "val_loss_last": losses[LAST].mean().item(),
        "train_loss": train_loss,
        "params": count_parameters(model),
        "tokens": num_steps * BATCH * SEQ_LEN,
        "cpu_s": round(trained_s, 1),
    }


def _slug(name: str, *parts: object) -> str:
    return "-".join(["".join(c if c.isalnum() else "_" for c in name), *map(str, parts)])


class Comparison:
    """All runs of one call, sweep first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.variants = args, variants()
        self.data = corpus(400_000 if args.quick else 8_000_000)
        self.num_windows = 4 if args.quick else 128

    def run(self, name: str, seed: int, lr: float, steps: int) -> Run:
        """One training of a variant."""
        config = self.variants[name].config
        settings = {"model": settings_of(config), "seed": seed, "steps": steps, "lr": lr, "seq_len": SEQ_LEN,
                    "batch": BATCH, "train_bytes": len(self.data[0]), "windows": self.num_windows}  # fmt: skip
        work = partial(one_run, config, seed, steps, lr, self.data, self.num_windows, self.args.compile)
        return Run(_slug(name, steps, lr, seed), settings, work)

    def rates(self, names: list[str]) -> dict[str, dict[float, float]]:
        """{variant: {learning rate: validation loss}} on the pilot seed."""
        pilots = sorted({self.variants[name].rate_of for name in names})
        steps = max(1, round(self.args.steps * PILOT_SHARE))
        runs = [self.run(name, PILOT_SEED, lr, steps) for name in pilots for lr in LRS]
        results = iter(run_all(self.args.out, runs, self.args.jobs))
        return {name: {lr: next(results)["val_loss"] for lr in LRS} for name in pilots}

    def summary(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """One row per variant."""
        sweeps = self.rates(names)
        best = {n: min(s, key=lambda lr, s=s: s[lr] if math.isfinite(s[lr]) else math.inf) for n, s in sweeps.items()}
        todo = []
        for name in names:
            variant = self.variants[name]
            steps = self.args.steps * variant.steps_factor
            todo += [self.run(name, seed, best[variant.rate_of], steps) for seed in range(self.args.seeds)]
        results = iter(run_all(self.args.out, todo, self.args.jobs))
        summary = {}
        for name in names:
            rows = [next(results) for _ in range(self.args.seeds)]
            row: dict[str, Any] = {"lr": best[self.variants[name].rate_of]}
            for key in ("val_loss", "val_loss_first", "val_loss_last"):
                values = [r[key] for r in rows]
                row |= {f"{key}_mean": mean(values), f"{key}_by_seed": values}
                row[f"{key}_std"] = stdev(values) if len(rows) > 1 and all(map(math.isfinite, values)) else None
            row |= {"params": rows[0]["params"], "tokens": rows[0]["tokens"], "cpu_s": mean(r["cpu_s"] for r in rows)}
            if name in sweeps:
                row["sweep"] = {str(lr): loss for lr, loss in sweeps[name].items()}
            summary[name] = row
        return summary


def margin(summary: dict, name: str, key: str = "val_loss") -> tuple[float | None, float | None]:
    """How far Hope lies below `name`, nats per byte, and the standard error of the difference, paired by seed."""
    if HOPE not in summary or name not in summary:
        return None, None
    pairs = zip(summary[name][f"{key}_by_seed"], summary[HOPE][f"{key}_by_seed"], strict=True)
    apart = [other - hope for other, hope in pairs]
    if not all(map(math.isfinite, apart)):
        return None, None
    return mean(apart), stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None


def margins(summary: dict) -> dict[str, Any]:
    """The figures that the claims rest on."""
    out: dict[str, Any] = {}
    for short, name in (("margin_over_transformer_conv", RIVAL), ("writes_margin", WRITES_OFF)):
        out[short], out[short.replace("over_transformer_conv", "se") if "over" in short else f"{short}_se"] = margin(
            summary, name
        )
    out["by_position"] = {
        part: {
            "hope": summary.get(HOPE, {}).get(f"val_loss_{part}_mean"),
            "margin_over_transformer_conv": margin(summary, RIVAL, f"val_loss_{part}"),
            "writes_margin": margin(summary, WRITES_OFF, f"val_loss_{part}"),
        }
        for part in ("first", "last")
    }
    out["margin_at_equal_cpu_time"] = margin(summary, RIVAL_EQUAL_TIME)
    return out


def shortfalls(summary: dict, found: dict, goal: int, entropy: float) -> list[str]:
    """Claims that these runs do not show."""
    missed = [f"{n}: not finite" for n, r in summary.items() if not math.isfinite(r["val_loss_mean"])]
    missed += [f"{n}: parameters" for n, r in summary.items() if abs(r["params"] / goal - 1) > 0.02]
    if HOPE in summary and not summary[HOPE]["val_loss_mean"] < entropy:
        missed.append("hope: not below the unigram entropy")
    if RIVAL in summary and not (found["margin_over_transformer_conv"] or 0) >= 0.10:
        missed.append("hope is not 0.10 nats below transformer++ with conv")
    if WRITES_OFF in summary:
        error = found["writes_margin_se"]
        if error is None or not found["writes_margin"] >= 2 * error:
            missed.append("hope is not two standard errors below writes off")
        first, last = (found["by_position"][part]["writes_margin"][0] for part in ("first", "last"))
        if first is None or not last > first:
            missed.append("what writing gains does not grow with the position")
    return missed


def page(summary: dict, found: dict, missed: list[str], entropy: float, args: argparse.Namespace) -> str:
    """The dated page."""

    def difference(pair: tuple[float | None, float | None]) -> str:
        value, error = pair
        return "-" if value is None else f"{value:+.4f}" + ("" if error is None else f" (standard error {error:.4f})")

    lines = [
        f"# Small language models, {date.today().isoformat()}",
        "",
        f"Python's standard library as bytes, {args.steps} steps of {BATCH} x {SEQ_LEN}, AdamW, learning rate swept "
        f"over {', '.join(f'{lr:g}' for lr in LRS)} on a pilot seed, seeds 0-{args.seeds - 1}, "
        f"torch {torch.__version__} on one CPU core. Unigram entropy {entropy:.4f} nats per byte. "
        "Made by `python -m benchmarks.small_lm`.",
        "",
        "| model | validation, nats per byte | spread | first 256 | last half | lr | parameters | tokens | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        spread = "-" if row["val_loss_std"] is None else f"{row['val_loss_std']:.4f}"
        lines.append(
            f"| {name} | {row['val_loss_mean']:.4f} | {spread} | {row['val_loss_first_mean']:.4f} | "
            f"{row['val_loss_last_mean']:.4f} | {row['lr']:g} | {row['params']:,} | {row['tokens']:,} | "
            f"{row['cpu_s']:.0f} |"
        )
    lines += ["", "Hope lies below (nats per byte, paired by seed):", ""]
    for name in (RIVAL, WRITES_OFF, RIVAL_EQUAL_TIME):
        if name in summary and HOPE in summary:
            by_part = ", ".join(
                f"{label} {difference(margin(summary, name, f'val_loss_{part}'))}"
                for part, label in (("first", "first 256 positions"), ("last", "last half"))
            )
            lines.append(f"- {name}: {difference(margin(summary, name))}; {by_part}")
    lines += ["", "Sweeps on the pilot seed:", ""]
    for name, row in summary.items():
        if "sweep" in row:
            lines.append(f"- {name}: " + ", ".join(f"{lr} {loss:.4f}" for lr, loss in row["sweep"].items()))
    lines += ["", "Falls short: " + ("; ".join(missed) if missed else "nothing") + "."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a few steps of every variant, nothing kept")
    parser.add_argument("--only", nargs="+", help="names of variants, as in the table")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="do not send the chunk step through torch.compile (needs a C++ compiler)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/small_lm"), help="folder of the runs' JSON")
    parser.add_argument("--page", type=Path, help="write the page here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory()
    if args.quick:
        args.steps, args.seeds, args.out, args.compile = 2, 1, Path(scratch.name), False
    comparison = Comparison(args)
    names = args.only or list(comparison.variants)
    unknown = set(names) - set(comparison.variants)
    if unknown:
        parser.error(f"--only {sorted(unknown)}: choose from {', '.join(comparison.variants)}")
    entropy = unigram_entropy(*comparison.data)
    summary = comparison.summary(names)
    found = margins(summary)
    goal = _parameters(comparison.variants[HOPE].config)
    missed = [] if args.quick else shortfalls(summary, found, goal, entropy)
    text = page(summary, found, missed, entropy, args)
    print(text)
    if args.page:
        args.page.write_text(text)
    if args.json:
        print(json.dumps({"models": summary, "unigram_entropy": entropy, "missed": missed} | found))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
