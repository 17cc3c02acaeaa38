"""A table of training speed on this machine's GPU; a part of `make gpu-check`.

    python -m benchmarks.gpu_model [--json] [--quick] [--device cuda|cpu] [--budget-s S] [--out FILE]

Needs CUDA and torch >= 2.11, nothing else. Forward and backward of Hope (as jobs run it, eager and compiled per block
step) and Transformer++ (compiled per block) at 160m and 1p3b shapes, T = 2k / 8k / 32k, 32k tokens a step, and both on
packed documents at the job's micro-batch of 2 x 4,096. bf16 parameters, no optimizer: thousand tokens/s, peak memory,
and the share of a same-process 8192^3 bf16 product that the model's FLOPs (without recomputation) make up. What does
not fit in time or memory is listed as skipped.
--device cpu --quick proves the machinery without a GPU; such figures mean nothing else.
"""

import argparse
import gc
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels.cost import forward_flops_per_token
from nltrain.model import LanguageModel, ModelConfig, arrange, as_trained, build, preset, say_choices

TOKENS_PER_STEP = 32_768
# As in jobs on GPUs: fp32 products of the memories run as TF32; their state stays fp32.
MATMUL_PRECISION = "high"
# Of the job's micro-batch, whose documents are packed.
PACKED_TOKENS_PER_STEP, MEAN_DOCUMENT_TOKENS = 2 * 4_096, 700
# Most wanted first: the budget may end before the list does.
CELLS = [
    cell
    for size in ("160m", "1p3b")
    for cell in [
        *((family, "packed", size, 4_096) for family in ("hope", "transformer")),
        *(
            (family, mode, size, num_tokens)
            for num_tokens in (2_048, 8_192, 32_768)
            for family, mode in (("transformer", "compiled"), ("hope", "compiled"), ("hope", "eager"))
        ),
    ]
]


@dataclass
class Row:
    """One measured or skipped cell."""

    family: str
    mode: str
    size: str
    seq_len: int
    skipped: str | None = None
    kilo_tokens_per_s: float | None = None
    share_of_gemm: float | None = None
    peak_memory_gb: float | None = None
    step_s: float | None = None
    steps: int | None = None


class Clock:
    """Seconds left of the budget, and synchronised timing."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self.device, self.ends = device, time.monotonic() + budget_s

    def left_s(self) -> float:
        """Seconds until the budget ends."""
        return self.ends - time.monotonic()

    def time_s(self, function: Any) -> float:
        """Wall seconds of one call, the device synchronised before and after."""
        self.synchronize()
        began = time.monotonic()
        function()
        self.synchronize()
        return time.monotonic() - began

    def synchronize(self) -> None:
        """Waits until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gemm_flops_per_s(clock: Clock, size: int) -> float:
    """The rate of a size^3 bf16 product."""
    a = torch.randn(size, size, device=clock.device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    times = sorted(clock.time_s(lambda: a @ a) for _ in range(10))
    return 2 * size**3 / times[len(times) // 2]


def train_flops_per_token(config: ModelConfig, model: LanguageModel, seq_len: int) -> float:
    """Forward and backward, without recomputation: 6 per parameter in a product, attention 6 L T D, memories x 3."""
    dense = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".memories." not in n)
    if config.family == "transformer":
        return 6 * dense + 6 * config.num_layers * seq_len * config.width
    memories = forward_flops_per_token(config.rule, config.head_dim, config.memory_hidden) * config.num_heads
    return 6 * dense + 3 * memories * config.num_layers


class Models:
    """Models of one size, built as jobs build theirs; between two cells they wait in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._built: dict[tuple[bool, ModelConfig], LanguageModel] = {}

    def take(self, mode: str, config: ModelConfig) -> LanguageModel:
        """The model on the device, in bf16; mode "compiled": with ModelConfig.compile = "blocks"."""
        if any(other.width != config.width for _, other in self._built):
            self._built.clear()
        compiled = mode == "compiled"
        if (compiled, config) not in self._built:
            torch.manual_seed(0)
            as_run = config
            if compiled:
                torch.compiler.reset()
                # Without a GPU, inductor shows nothing and takes minutes.
                backend = "inductor" if self._device.type == "cuda" else "aot_eager"
                # Compiled code and recomputed blocks exclude each other.
                recompute = "chunks" if config.family == "hope" else "none"
                as_run = replace(config, compile="blocks", compile_backend=backend, recompute=recompute)
            print(f"{config.family}, {mode}: {say_choices(as_run, self._device, torch.bfloat16)}", flush=True)
            self._built[compiled, config] = build(as_run, dtype=torch.bfloat16)
        return self._built[compiled, config].to(self._device)

    def give_back(self, mode: str, config: ModelConfig) -> None:
        """Frees the device."""
        if model := self._built.get((mode == "compiled", config)):
            model.zero_grad(set_to_none=True)
            model.cpu()


def documents_of(mode: str, config: ModelConfig, batch: int, seq_len: int, device: torch.device) -> Any:
    """Mode "packed": documents of MEAN_DOCUMENT_TOKENS on average, laid out beside the data; else None."""
    if mode != "packed":
        return None
    starts = torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(0)) < 1 / MEAN_DOCUMENT_TOKENS
    return arrange(config, starts).to(device)


def measure(row: Row, config: ModelConfig, tokens_per_step: int, clock: Clock, gemm: float, models: Models) -> None:
    """Fills the row; raises what the cell raises."""
    device = clock.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = models.take(row.mode, config)
    batch = max(1, tokens_per_step // row.seq_len)
    tokens = torch.randint(0, config.vocab_size, (batch, row.seq_len), device=device)
    documents = documents_of(row.mode, config, batch, row.seq_len, device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(tokens, tokens, documents).backward()

    first_s = clock.time_s(step)
    if first_s > clock.left_s():
        raise TimeoutError(f"one step took {first_s:.0f} s")
    times = [clock.time_s(step)]
    while len(times) < 20 and sum(times) < 8 and times[-1] < clock.left_s():
        times.append(clock.time_s(step))
    row.steps, row.step_s = len(times), sorted(times)[len(times) // 2]
    row.kilo_tokens_per_s = batch * row.seq_len / row.step_s / 1000
    row.share_of_gemm = train_flops_per_token(config, model, row.seq_len) * row.kilo_tokens_per_s * 1000 / gemm
    if device.type == "cuda":
        row.peak_memory_gb = torch.cuda.max_memory_allocated(device) / 1e9


def table(clock: Clock, quick: bool, gemm: float) -> list[Row]:
    """All cells, in order, until the budget is spent."""
    rows, models = [], Models(clock.device)
    for family, mode, size, seq_len in CELLS:
        row = Row(family, mode, size, seq_len)
        rows.append(row)
        # The rival keeps its activations where they fit.
        config = as_trained(family, size) if family == "hope" else preset(family, size)
        tokens_per_step = PACKED_TOKENS_PER_STEP if mode == "packed" else TOKENS_PER_STEP
        if quick:
            config = replace(config, num_layers=1, width=256, vocab_size=512)
            row.seq_len = tokens_per_step = seq_len // 16
        if clock.left_s() < (2 if quick else 15):
            row.skipped = "no time left"
            continue
        try:
            measure(row, config, tokens_per_step, clock, gemm, models)
        except torch.OutOfMemoryError:
            row.skipped = "out of memory"
        except TimeoutError as error:
            row.skipped = f"too slow: {error}"
        except Exception as error:  # a compiler failure must not hide the other cells
            row.skipped = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        models.give_back(mode, config)
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        print(describe(row), flush=True)
    return rows


def describe(row: Row) -> str:
    """One line of the table."""
    name = f"{row.family:12} {row.mode:9} {row.size:5} T={row.seq_len:6}"
    if row.skipped:
        return f"{name}  skipped: {row.skipped}"
    memory = "" if row.peak_memory_gb is None else f"  {row.peak_memory_gb:6.1f} GB"
    return f"{name}  {row.kilo_tokens_per_s:8.2f} kt/s  {row.share_of_gemm:6.1%} of the 8192^3 product{memory}"


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    out: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "device": platform.processor() or "cpu",
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        out |= {"device": found.name, "memory_gb": round(found.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return out


def main() -> int:
    """The table. Returns 2 without a device, 1 when nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="one narrow layer, T / 16")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only proves the machinery")
    parser.add_argument("--budget-s", type=float, default=180, help="seconds for the table")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device here (torch {torch.__version__}): nothing was measured. "
              "Run it on a machine with a GPU and a CUDA build of torch.")  # fmt: skip
        return 2
    device = torch.device(args.device)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    clock = Clock(device, args.budget_s)
    size = 512 if args.device == "cpu" else 8192
    gemm = gemm_flops_per_s(clock, size)
    print(hardware(device))
    print(f"{size}^3 bf16 product: {gemm / 1e12:.1f} TFLOP/s", flush=True)
    rows = table(clock, args.quick, gemm)
    measured = [row for row in rows if row.skipped is None]
    results = {
        "hardware": hardware(device),
        "gemm_size": size,
        "gemm_tflop_per_s": gemm / 1e12,
        "float32_matmul": MATMUL_PRECISION,
        "rows": [asdict(row) for row in rows],
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    if args.json:
        print(json.dumps(results))
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
