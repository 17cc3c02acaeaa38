"""Formal languages (parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n, Shuffle-2) and associative recall.

    python -m benchmarks.languages [--json] [--quick] [--only TASK ...] [--models NAME ...] [--seeds N] [--steps N]
                                   [--jobs N] [--out DIR] [--page FILE]

Hope, Transformer++ and a matrix memory learn each language from strings of up to 40 symbols and are tested up to 40
and on 41-100, per position and by whole strings. One configuration of Hope learns all six. Beyond the training length
two protocols are reported: the weights of the last step, and those of the step that was best on strings of 41-100
symbols of a validation set of its own (looked at every 25 steps), which is how published rows are often made.
Recall: 8 fresh pairs of 16 x 16 symbols in every sequence, at equal steps, Hope with writes on and off and the rivals.
Recall with overwriting: 4 of the 8 keys get a second value and the last one counts, which gradient descent
(lambda_d = 0) has to forget by itself. Each task, model and seed is a run that writes its JSON under --out and is
skipped when it is there; --page writes a dated page from them. --quick proves the machinery with a few steps.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._runs import Run, count_parameters, run_all, settings_of, train
from benchmarks._tasks import IGNORED, LANGUAGES, NUM_CLASSES, Sampler, accuracy, recall
from nltrain.model import LanguageModel, ModelConfig, build, preset
from nltrain.model.presets import MATRIX

SHORT, LONG = 40, 100
RECALL_PAIRS, RECALL_SYMBOLS, RECALL_OVERWRITTEN = 8, 16, 4
LOOK_EVERY_STEPS, NUM_LOOKS_AT = 25, 128  # selection by a validation set of longer strings
LR, WARMUP_STEPS = 5e-3, 100  # of every model; with 25 steps of warm-up recall is learned much later


def language_models() -> dict[str, ModelConfig]:
    """About 11 thousand parameters each; one configuration for all languages."""
    size = {"vocab_size": NUM_CLASSES, "width": 32, "head_dim": 16, "memory_hidden": 16, "num_layers": 1}
    # Two kinds of head. lambda_d * eta = 2 gives the eigenvalue -1 that flips a state; without erasure a head counts.
    # The hard gate reaches both ends of eta, and alpha starts at 1: neither lets a state drift.
    by_head = replace(
        MATRIX, eta_max=0.1, lambda_d=(20.0, 0.0), eta_gate="hard", chunk_mem=16, chunk_other=16, decay="literal"
    )
    hope = replace(
        preset("hope", "tiny"), **size, rule=by_head, levels=("ffn",), cms_hidden=48, eta_init=0.09,
        alpha_init=1 - 1e-6,
    )  # fmt: skip
    rival = {**size, "head_dim": 32, "memory_hidden": 32}
    return {
        "hope": hope,
        "transformer++": replace(preset("transformer", "tiny"), **rival | {"num_layers": 2}, ffn_hidden=48),
        "matrix memory": replace(preset("matrix", "tiny"), **rival | {"num_layers": 2}, cms_hidden=48),
    }


def recall_models() -> dict[str, ModelConfig]:
    """Two layers of width 64. The MLP memories start with keys far apart (w2_scale) and write as strongly as four
    tokens at a time allow; probes with eta_max 1, or w2_scale 4 without the normalised step, ended in NaN.
    """
    size = {"vocab_size": 2 * RECALL_SYMBOLS, "width": 64, "num_layers": 2, "head_dim": 32, "memory_hidden": 32}
    writing = {"chunk_mem": 4, "chunk_other": 4, "eta_max": 0.5}
    memories = {"w2_scale": 4.0, "eta_init": 0.25, "alpha_init": 0.999, "cms_hidden": 128}
    hope, titans = (replace(preset(name, "tiny"), **size, **memories) for name in ("hope", "titans"))
    hope = replace(hope, rule=replace(hope.rule, **writing, normalized_step=True))
    return {
        "hope": hope,
        "hope, lambda_d = 0": replace(hope, rule=replace(hope.rule, lambda_d=0.0)),
        "hope, main memory alone": replace(hope, rule=replace(hope.rule, adaptive=())),
        "hope, writes off": replace(hope, rule=replace(hope.rule, writes=False)),
        "titans": replace(titans, rule=replace(titans.rule, **writing, normalized_step=True)),
        "matrix memory": replace(preset("matrix", "tiny"), **size, cms_hidden=128),
        "transformer++": replace(preset("transformer", "tiny"), **size, ffn_hidden=128),
    }


class Task(NamedTuple):
    """What is learned, by whom, and how; the same steps, rate and batch for all models."""

    sampler: Sampler
    models: dict[str, ModelConfig]
    batch: int  # sequences per step
    longer: bool  # whether strings longer than in training exist


def tasks() -> dict[str, Task]:
    """By name."""
    found = {name: Task(sampler, language_models(), 32, True) for name, sampler in LANGUAGES.items()}
    found["recall"] = Task(recall(RECALL_PAIRS, RECALL_SYMBOLS), recall_models(), 64, False)
    overwriting = recall(RECALL_PAIRS, RECALL_SYMBOLS, RECALL_OVERWRITTEN)
    some = {n: c for n, c in recall_models().items() if n in ("hope", "hope, lambda_d = 0", "matrix memory")}
    found["recall with overwriting"] = Task(overwriting, some, 64, False)
    return found


def _batches(task: Task, lengths: list[int], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        yield task.sampler(length, task.batch, generator)


def _lengths(num_steps: int, seed: int) -> list[int]:
    """String lengths from 4 to a longest that grows from 6 to 40 over the first half of the steps."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(num_steps):
        longest = 6 + (SHORT - 6) * min(1.0, 2 * step / num_steps)
        out.append(int(torch.randint(4, int(longest) + 1, (), generator=generator)))
    return out


@torch.no_grad()
def _score(model: LanguageModel, sampler: Sampler, length: int, begin: int, count: int, seed: int) -> Any:
    """Accuracies per position and by whole strings over positions from `begin` on; None where nothing is asked."""
    tokens, targets = sampler(length, count, torch.Generator().manual_seed(seed))
    targets[:, :begin] = IGNORED
    rows = (targets != IGNORED).any(1)
    if not rows.any():
        return None
    predicted = torch.cat([model(part)[0].argmax(-1) for part in tokens[rows].split(64)])
    return accuracy(predicted, targets[rows])


def _test(model: LanguageModel, task: Task, count: int, seed: int, prefix: str = "") -> dict[str, float]:
    """Accuracies on strings as long as in training, and behind position 40 of longer ones."""
    out = {}
    for span, length, begin in (("in_range", SHORT, 0), ("beyond", LONG, SHORT)):
        if span == "beyond" and not task.longer:
            continue
        found = _score(model, task.sampler, length, begin, count, seed + length)
        if found is not None:
            out[f"{prefix}{span}_positions"], out[f"{prefix}{span}_strings"] = found
    return out


def one_run(config: ModelConfig, task: Task, seed: int, num_steps: int, num_tests: int) -> dict:
    """Trains on short strings and tests in range and beyond, after the last step and at the best look."""
    torch.manual_seed(seed)
    model = build(config)
    batches = _batches(task, _lengths(num_steps, seed), seed + 1)
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})

    def look(step: int, _: float) -> bool:
        nonlocal best
        if (step + 1) % LOOK_EVERY_STEPS == 0 and task.longer:
            found = _score(model, task.sampler, LONG, SHORT, NUM_LOOKS_AT, seed + 5_000)
            # A later step wins a draw: it has seen more strings.
            if found is not None and sum(found) >= best[0]:
                best = sum(found), step + 1, {n: p.detach().clone() for n, p in model.state_dict().items()}
        return False

    loss = train(model, batches, num_steps, LR, weight_decay=0.01, warmup_steps=WARMUP_STEPS, on_step=look)
    out = {"train_loss": loss, "params": count_parameters(model)} | _test(model, task, num_tests, seed + 999)
    if best[2]:
        model.load_state_dict(best[2])
        out |= {"selected_step": best[1]} | _test(model, task, num_tests, seed + 999, "selected_")
    return out


def page(rows: list[dict], args: argparse.Namespace) -> str:
    """The dated page."""
    lines = [
        f"# Formal languages and recall, {date.today().isoformat()}",
        "",
        f"Means over {args.seeds} seeds; {args.steps} steps of 32 strings of 4 to {SHORT} symbols, AdamW lr "
        f"{LR:g} after {WARMUP_STEPS} steps of warm-up; recall: 64 sequences a step, {RECALL_PAIRS} pairs of "
        f"{RECALL_SYMBOLS} x {RECALL_SYMBOLS} symbols, guessing gives "
        f"{1 / RECALL_SYMBOLS:.2f}, the commonest of the values shown 0.26. "
        f"torch {torch.__version__} on CPU. "
        "Accuracy per position (and by whole strings). Made by `python -m benchmarks.languages`.",
        "",
        "| task | model | parameters | up to 40 | 41-100, last step | 41-100, selected step |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        near, far, selected = (
            f"{r[f'{span}_positions']:.3f} ({r[f'{span}_strings']:.3f})" if f"{span}_positions" in r else "-"
            for span in ("in_range", "beyond", "selected_beyond")
        )
        lines.append(f"| {r['task']} | {r['model']} | {r['params']:,} | {near} | {far} | {selected} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, nothing kept")
    parser.add_argument("--only", nargs="+", help=f"tasks among {', '.join([*LANGUAGES, 'recall'])}")
    parser.add_argument("--models", nargs="+", help="names of models, as in the table")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per task and model")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/languages"), help="folder of the runs' JSON")
    parser.add_argument("--page", type=Path, help="write the page here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = tasks()
    unknown = set(args.only or ()) - set(known)
    if unknown:
        parser.error(f"--only {sorted(unknown)}: choose from {', '.join(known)}")
    scratch = tempfile.TemporaryDirectory()
    if args.quick:
        args.steps, args.seeds, args.out = 3, 1, Path(scratch.name)

    runs = []
    for name_of_task in args.only or known:
        task = known[name_of_task]
        for name, config in task.models.items():
            for seed in range(args.seeds) if not args.models or name in args.models else ():
                settings = {"model": settings_of(config), "task": name_of_task, "seed": seed, "steps": args.steps}
                settings |= {"lr": LR, "warmup_steps": WARMUP_STEPS, "batch": task.batch}
                slug = "".join(c if c.isalnum() else "_" for c in f"{name_of_task}-{name}-{seed}")
                work = partial(one_run, config, task, seed, args.steps, 32 if args.quick else 512)
                runs.append(Run(slug, settings, work))
    left = iter(run_all(args.out, runs, args.jobs))

    rows = []
    for name_of_task in args.only or known:
        for name in known[name_of_task].models:
            if args.models and name not in args.models:
                continue
            results = [next(left) for _ in range(args.seeds)]
            shared = [k for k in results[0] if k != "wall_s" and all(k in r for r in results)]
            rows.append({"task": name_of_task, "model": name} | {k: mean(r[k] for r in results) for k in shared})
            rows[-1]["params"] = results[0]["params"]
    text = page(rows, args)
    print(text)
    if args.page:
        args.page.write_text(text)
    missed = [f"{r['task']}, {r['model']}: not finite" for r in rows if not math.isfinite(r["train_loss"])]
    if args.json:
        print(json.dumps({"rows": rows, "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
