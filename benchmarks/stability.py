"""Does any text break the default memories? A grid, an attack, the grid after training, and training.

    python -m benchmarks.stability [--json] [--quick] [--only grid attack trained training] [--lengths T ...]
                                   [--chunks C ...] [--widths D ...] [--jobs N] [--out DIR] [--rule FIELD=VALUE ...]
                                   [--no-compile]

grid: 13 texts (benchmarks/_texts.py) x 3 alphas x 3 seeds at each chunk length, head width and sequence length, eta at
0.98 of its cap. A case is one text, alpha and seed. It fails when an output, a state or a gradient is not finite, or
when |dW| / |W| exceeds 1 anywhere along the sequence. A part of it also runs with bf16 inputs.
attack: gradient ascent on the inputs of the memories themselves (k, v, q, gates) makes them grow as far as it can, from
weights as small as at initialisation and larger than training makes them. A case is one matrix size, chunk and seed. It
fails when something is not finite, or when a matrix moves further than `kernels.rule.largest_change` allows.
trained: a one-layer model after 2,000 steps of 2,048 tokens, on the same texts, as trained and with eta pushed to 0.98
of its cap. Chunks of 1 use the weights trained at 16, because 2,048 sequential steps per token string take too long.
training: 300 steps at 1,024, 2,048 and 4,096 tokens, 3 seeds, chunks of 16 and 64; every loss and every gradient must
be finite, so that no micro-step would be skipped.

Each part of the grid and each training is a run that writes its JSON under --out and is skipped when it is there. The
exit code is 1 when a case fails. --rule tries another rule on the same grid (layerwise_dgd=false, eta_max=0.5).
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._runs import Run, run_all, settings_of, train
from benchmarks._texts import TEXTS, VOCAB, text
from benchmarks.small_lm import corpus, windows
from kernels import Inputs, MemoryRule, MemoryState
from kernels.chunk import self_modify
from kernels.rule import largest_change
from kernels.state import gate_bias
from nltrain.config import override
from nltrain.model import LanguageModel, ModelConfig, build, preset
from nltrain.model.packing import Packing
from nltrain.model.parts import MemoryHolder

PARTS = ("grid", "attack", "trained", "training")
CHUNKS, WIDTHS, LENGTHS = (1, 16, 64, 256), (32, 128), (4096, 32768)
ALPHAS, NUM_SEEDS, ETA_SHARE, BOUND = (0.99, 0.999, 0.9999), 3, 0.98, 1.0
ROWS = 4  # texts at a time: what fits 6 GB at 32,768 tokens and heads of 128
PIECE = 512  # tokens between two looks at |dW| / |W|
BFLOAT16_PART = ((16, 4096), (64, 4096))  # (chunk, length) that also run with bf16 inputs
TRAINED_STEPS, TRAINED_LENGTH, TRAINED_CHUNKS = 2000, 2048, (16, 64, 256)
TRAINING_STEPS, TRAINING_LENGTHS, TRAINING_CHUNKS = 300, (1024, 2048, 4096), (16, 64)
LR = 3e-3
ATTACK_STEPS, ATTACK_TOKENS, ATTACK_CHUNKS = 100, 512, (1, 16, 64)
# (w1_std, w2_scale): at initialisation; what 600 steps of small_lm reach; four times that.
ATTACK_SIZES = ((0.02, 1.0), (0.15, 1.2), (0.6, 4.0))


@dataclass(frozen=True)
class Cell:
    """A part of the grid that is run at once: some texts at one chunk length, head width and sequence length."""

    rule: MemoryRule
    head_dim: int
    num_tokens: int
    texts: tuple[str, ...]
    bfloat16: bool = False

    @property
    def name(self) -> str:
        """Name of its file."""
        kind = "-bf16" if self.bfloat16 else ""
        first = list(TEXTS).index(self.texts[0])
        return f"grid-c{self.rule.chunk_mem}-d{self.head_dim}-t{self.num_tokens}{kind}-{first}"


def config_of(rule: MemoryRule, head_dim: int, num_heads: int, alpha: float = 0.99) -> ModelConfig:
    """One layer of memories over bytes."""
    return replace(
        preset("hope", "tiny"), vocab_size=VOCAB, width=num_heads * head_dim, head_dim=head_dim,
        memory_hidden=head_dim, num_layers=1, cms_hidden=96, rule=rule, alpha_init=alpha,
    )  # fmt: skip


def push_gates(model: LanguageModel, alphas: Sequence[float] | None) -> None:
    """Moves eta to ETA_SHARE of its cap in every head, and alpha to `alphas` [H]; None leaves alpha as it is."""
    for block in model.blocks:
        bias = block.mixer.memories.gate_bias  # type: ignore[union-attr]
        rule = model.config.rule
        with torch.no_grad():
            for head in range(bias.shape[1]):
                alpha = 0.5 if alphas is None else alphas[head]
                eta_bias, alpha_bias = gate_bias(rule, ETA_SHARE * rule.eta_limit, alpha)
                bias[0, head] = eta_bias
                if alphas is not None:
                    bias[1, head] = alpha_bias


def judge(model: LanguageModel, tokens: Tensor, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    """Of the first layer's memories on tokens [B, T]: whether each row and head is finite, and its largest |dW| / |W|.

    Finite are outputs, states and gradients (by every input of the memories, through all writes).
    """
    block = model.blocks[0]
    mixer, packing = block.mixer, Packing.of(tuple(tokens.shape)).to(tokens.device)
    with torch.no_grad():
        inputs, _ = mixer._inputs(block.norm(model.embedding(tokens)), packing, None)  # type: ignore[operator]
        if bfloat16:
            inputs = Inputs(*(None if x is None else x.bfloat16() for x in inputs))  # type: ignore[arg-type]
        initial = MemoryHolder.pack(mixer.memories())  # type: ignore[operator]
    rule: MemoryRule = mixer.rule  # type: ignore[assignment]

    def size(weights: Any, dims: int) -> Tensor:
        return torch.stack([w.float().square().flatten(dims).sum(dims) for w in weights if w is not None]).sum(0).sqrt()

    start, ratio, state = size(initial.weights, 1), torch.zeros(len(tokens), mixer.config.num_heads), None  # type: ignore[union-attr]
    finite = torch.ones_like(ratio, dtype=torch.bool)
    with torch.no_grad():
        for begin in range(0, tokens.shape[1], PIECE):
            part = Inputs(*(None if x is None else x[:, begin : begin + PIECE] for x in inputs))  # type: ignore[arg-type]
            _, state = self_modify(part, initial, rule, state)
            moved = state.run if rule.decay == "deviation" else state.run.zip(initial.weights, torch.sub)
            found = size(moved, 2) / start
            finite &= found.isfinite()
            ratio = torch.maximum(ratio, found.nan_to_num(nan=math.inf))
    leaves = Inputs(*(None if x is None else x.detach().requires_grad_() for x in inputs))  # type: ignore[arg-type]
    out, final = self_modify(leaves, initial, rule, recompute=True)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    (out * weight).sum().backward()
    finite &= out.detach().isfinite().all(-1).all(1)
    for tensors in (leaves, ()):
        for leaf in tensors:
            if leaf is not None and leaf.grad is not None:
                finite &= leaf.grad.isfinite().flatten(3).all(-1).all(1)
    assert isinstance(final, MemoryState)
    for tensor in final.to_tensors().values():
        if tensor.is_floating_point():
            finite &= tensor.detach().isfinite().flatten(2).all(-1)
    return finite, ratio


def run_cell(cell: Cell) -> dict:
    """All alphas and seeds of the cell's texts: the heads of one layer, three per alpha."""
    alphas = [alpha for alpha in ALPHAS for _ in range(NUM_SEEDS)]
    torch.manual_seed(cell.head_dim)
    model = build(config_of(cell.rule, cell.head_dim, len(alphas)))
    push_gates(model, alphas)
    tokens = torch.stack([text(name, cell.num_tokens, 7) for name in cell.texts])
    finite, ratio = judge(model, tokens, cell.bfloat16)
    failed = [
        f"{name}, alpha {alphas[head]}, seed {head % NUM_SEEDS}" + ("" if finite[row, head] else ": not finite")
        for row, name in enumerate(cell.texts)
        for head in range(len(alphas))
        if not finite[row, head] or not ratio[row, head] <= BOUND
    ]
    worst = ratio.amax(1).tolist()
    return {
        "cases": ratio.numel(),
        "failed": failed,
        "max_update_ratio": None if not all(map(math.isfinite, worst)) else max(worst),
        "update_ratio_by_text": dict(zip(cell.texts, worst, strict=True)),
    }


def attack(
    rule: MemoryRule, head_dim: int, w1_std: float, w2_scale: float, seed: int, num_steps: int, num_tokens: int
) -> dict[str, Any]:
    """Ascends log |dW| of every memory by the inputs of one layer; stops where something is not finite.

    Returns `finite`, `ratio` (largest |dW| / |W| of a memory's W2 in any step) and `over_limit`, the largest |dW| of
    any matrix over `largest_change`.
    """
    torch.manual_seed(seed)
    model = build(replace(config_of(rule, head_dim, 2, 0.999), w1_std=w1_std, w2_scale=w2_scale))
    push_gates(model, [0.999, 0.999])
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        initial = MemoryHolder.pack(mixer.memories())  # type: ignore[operator]
    shape = (1, num_tokens, 2, head_dim)
    leaves = [torch.randn(shape).requires_grad_() for _ in range(4)]
    optimizer = torch.optim.Adam(leaves, lr=0.1)
    rows = [rule.rows(name, head_dim, head_dim) for name in rule.full_names + rule.gate_names]
    start = torch.stack([initial.weights.w2[:, r].square().sum((-1, -2)) for r in rows]).detach()
    found: dict[str, Any] = {"finite": True, "ratio": 0.0, "over_limit": 0.0}
    for _ in range(num_steps):
        goal, state = torch.zeros(()), None
        for begin in range(0, num_tokens, 64):
            part = Inputs(*(x[:, begin : begin + 64] for x in leaves), None)  # type: ignore[arg-type]
            out, state = self_modify(part, initial, rule, state)
            size = torch.stack([state.run.w2[0][:, r].square().sum((-1, -2)) for r in rows])
            goal = goal + (size / start + 1e-6).log().mean()
            found["ratio"] = max(found["ratio"], (size / start).max().sqrt().item())
            sides = [size, state.run.w1.square().sum((-1, -2)), state.run.g1.square().sum(-1)]
            moved = max(side.max().sqrt().item() for side in sides)
            found["over_limit"] = max(found["over_limit"], moved / largest_change(rule, begin + 64))
        optimizer.zero_grad()
        (out.square().mean() - goal).backward()
        if not all(x.isfinite().all() for x in (out, *(leaf.grad for leaf in leaves))):  # type: ignore[union-attr]
            return found | {"finite": False}
        optimizer.step()
    return found


def run_attack(rule: MemoryRule, w1_std: float, w2_scale: float, seed: int, num_steps: int, num_tokens: int) -> dict:
    """`attack` as a run of this benchmark."""
    found = attack(rule, 32, w1_std, w2_scale, seed, num_steps, num_tokens)
    failed = [] if found["finite"] and found["over_limit"] <= 1 else [json.dumps(found)]
    return {"cases": 1, "failed": failed, **found}


def _compiled(config: ModelConfig, wanted: bool) -> ModelConfig:
    return replace(config, compile="steps" if wanted else "none")


def run_trained(rule: MemoryRule, num_steps: int, lengths: Sequence[int], compiled: bool) -> dict:
    """Trains one layer, then judges it on every text; for chunks of 16 also at chunks of 1."""
    torch.manual_seed(0)
    model, (data, _) = build(_compiled(config_of(rule, 32, 2), compiled)), corpus(4_000_000)
    loss = train(model, windows(data, TRAINED_LENGTH, 1, 0), num_steps, LR)
    out: dict[str, Any] = {"train_loss": loss, "cases": 0, "failed": [], "max_update_ratio": 0.0}
    bias = [block.mixer.memories.gate_bias.detach().clone() for block in model.blocks]  # type: ignore[union-attr]
    chunks = [rule.chunk_mem] + ([1] if rule.chunk_mem == 16 else [])
    for chunk in chunks:
        config = config_of(replace(rule, chunk_mem=chunk, chunk_other=chunk, eta_max=rule.eta_limit), 32, 2)
        tested = build(config)
        tested.load_state_dict(model.state_dict())
        for pushed in (False, True):
            for block, trained in zip(tested.blocks, bias, strict=True):
                block.mixer.memories.gate_bias.data.copy_(trained)  # type: ignore[union-attr]
            if pushed:
                push_gates(tested, None)
            for length in lengths if chunk > 1 else [min(lengths)]:
                for name in TEXTS:
                    finite, ratio = judge(tested, text(name, length, 7)[None])
                    out["cases"] += ratio.numel()
                    out["max_update_ratio"] = max(out["max_update_ratio"], ratio.max().item())
                    for head in range(ratio.shape[1]):
                        if not finite[0, head] or not ratio[0, head] <= BOUND:
                            how = "eta at its cap" if pushed else "as trained"
                            out["failed"].append(f"{name}, {length} tokens, chunk {chunk}, head {head}, {how}")
    return out


def run_training(rule: MemoryRule, length: int, seed: int, num_steps: int, compiled: bool) -> dict:
    """Trains two layers on real text; a step that is not finite ends it."""
    torch.manual_seed(seed)
    config = replace(config_of(rule, 32, 2), num_layers=2, cms_hidden=192)
    model, (data, _) = build(_compiled(config, compiled)), corpus(4_000_000)
    bad: list[str] = []

    def check(step: int, _: float) -> bool:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                bad.append(f"step {step}: gradient of {name}")
                return True
        return False

    loss = train(model, windows(data, length, max(1, 2048 // length), seed), num_steps, LR, on_step=check)
    return {"train_loss": loss, "failed": bad + ([] if math.isfinite(loss) else ["loss not finite"])}


def parse_rule(changes: Sequence[str]) -> MemoryRule:
    """The default rule with FIELD=VALUE changes."""
    config = override(preset("hope", "tiny"), [f"rule.{change}" for change in changes])
    return config.rule


def at_chunk(rule: MemoryRule, chunk: int) -> MemoryRule:
    """The rule at one chunk length for all memories."""
    return replace(rule, chunk_mem=chunk, chunk_other=chunk)


def all_runs(args: argparse.Namespace, rule: MemoryRule) -> list[Run]:
    """Every run of the wanted parts."""
    runs: list[Run] = []
    names = list(TEXTS)
    for chunk in args.chunks if "grid" in args.only else ():
        for width in args.widths:
            for length in args.lengths:
                for low in (False, True) if (chunk, length) in BFLOAT16_PART else (False,):
                    for first in range(0, len(names), ROWS):
                        cell = Cell(at_chunk(rule, chunk), width, length, tuple(names[first : first + ROWS]), low)
                        settings = {"model": settings_of(config_of(cell.rule, width, 9)), "tokens": length,
                                    "texts": list(cell.texts), "bfloat16": low}  # fmt: skip
                        runs.append(Run(cell.name, settings, partial(run_cell, cell)))
    for chunk in [c for c in args.chunks if c in ATTACK_CHUNKS] if "attack" in args.only else ():
        for w1_std, w2_scale in ATTACK_SIZES:
            for seed in range(NUM_SEEDS):
                own = at_chunk(rule, chunk)
                settings = {"model": settings_of(config_of(own, 32, 2)), "w1_std": w1_std, "w2_scale": w2_scale,
                            "seed": seed, "steps": args.attack_steps, "tokens": args.attack_tokens}  # fmt: skip
                work = partial(run_attack, own, w1_std, w2_scale, seed, args.attack_steps, args.attack_tokens)
                runs.append(Run(f"attack-c{chunk}-w{w2_scale:g}-{seed}", settings, work))
    for chunk in [c for c in args.chunks if c in TRAINED_CHUNKS] if "trained" in args.only else ():
        own = at_chunk(rule, chunk)
        settings = {"model": settings_of(config_of(own, 32, 2)), "steps": args.trained_steps, "lengths": args.lengths}
        work = partial(run_trained, own, args.trained_steps, args.lengths, args.compile)
        runs.append(Run(f"trained-c{chunk}", settings, work))
    for chunk in [c for c in args.chunks if c in TRAINING_CHUNKS] if "training" in args.only else ():
        for length in args.training_lengths:
            for seed in range(NUM_SEEDS):
                own = at_chunk(rule, chunk)
                settings = {"model": settings_of(config_of(own, 32, 2)), "steps": args.training_steps, "seed": seed,
                            "tokens": length}  # fmt: skip
                work = partial(run_training, own, length, seed, args.training_steps, args.compile)
                runs.append(Run(f"training-c{chunk}-t{length}-{seed}", settings, work))
    return runs


def main() -> int:
    """Runs the benchmark and prints what it found. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="the grid at 512 tokens, two training steps, nothing kept")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to run")
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS), help="tokens per chunk")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="head widths of the grid")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens per sequence")
    parser.add_argument("--rule", nargs="+", default=[], metavar="FIELD=VALUE", help="changes of the default rule")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="do not train through torch.compile (needs a C++ compiler)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/stability"), help="folder of the runs' JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory()
    args.attack_steps, args.attack_tokens = ATTACK_STEPS, ATTACK_TOKENS
    args.trained_steps, args.training_steps, args.training_lengths = TRAINED_STEPS, TRAINING_STEPS, TRAINING_LENGTHS
    if args.quick:
        args.trained_steps, args.training_steps, args.training_lengths = 2, 2, TRAINING_LENGTHS[:1]
        args.attack_steps, args.attack_tokens = 2, 128
        args.out, args.lengths, args.chunks, args.widths = Path(scratch.name), [512], [16, 64], [32]
        args.compile = False
    runs = all_runs(args, parse_rule(args.rule))
    results = dict(zip([run.name for run in runs], run_all(args.out, runs, args.jobs), strict=True))
    cases = sum(result.get("cases", 1) for result in results.values())
    failed = [f"{name}: {case}" for name, result in results.items() for case in result["failed"]]
    ratios = [result["max_update_ratio"] for result in results.values() if "max_update_ratio" in result]
    worst = None if None in ratios else max(ratios, default=None)
    print(f"{cases:,} cases, {len(failed)} failed; largest |dW| / |W| {worst}")
    for line in failed[:40]:
        print("  " + line)
    if args.json:
        parts = {
            part: {
                "cases": sum(r.get("cases", 1) for n, r in results.items() if n.startswith(part)),
                "failed": sum(len(r["failed"]) for n, r in results.items() if n.startswith(part)),
            }
            for part in args.only
        }
        print(json.dumps({"cases": cases, "failed": len(failed), "max_update_ratio": worst, "parts": parts,
                          "failures": failed}))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
