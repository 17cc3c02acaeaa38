"""The real training loop on one device without Ray: killed and resumed, every ZeRO stage, memory against the plan.

    python -m benchmarks.gpu_job [--json] [--quick] [--device cuda|cpu] [--skip PART ...] [--out FILE]

One rank (NCCL, or gloo with --device cpu) trains a small Hope with the settings of the jobs on GPUs: bf16, blocks
recomputed, a slow level in host memory, checkpoints to a folder. Each run is a process of its own, so that a part that
fails does not hide the others. Needs the packages of the loop (deepspeed and those in NEEDED), not ray. Parts:

    resume   60 quanta without a disturbance; the same killed by SIGKILL in the middle and started again: equal weights,
             losses, validation and sample
    stages   ZeRO 1, 2 and 3: the same losses within rounding
    memory   the most that the device held while 160m trained, over what plan and count of activations say (GPU only)
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = (
    "deepspeed",
    "numpy",
    "safetensors",
    "tokenizers",
    "webdataset",
    "boto3",
    "pyarrow",
    "zstandard",
    "matplotlib",
)
PARTS = ("resume", "stages", "memory")
STAGES = (1, 2, 3)
# Sums in bf16 differ in their order between stages; the losses are those of a model that has hardly learned yet.
STAGES_BOUND = 0.01
# The plan counts an upper bound of gradients, the device holds more than what is alive: fragments and workspaces.
MEMORY_BOUNDS = (0.5, 1.5)
RUN_TIMEOUT_S = 240.0


class PartFailed(Exception):
    """A run of this part failed, or a comparison did not hold; the message says which."""


def settings(folder: Path, device: str, quick: bool) -> dict[str, Any]:
    """Overrides of the job: a model with the heads of the large ones, two layers, 4 sequences per quantum."""
    seq_len, width, num_quanta = (64, 64, 12) if quick else (512, 256, 60)
    head, quantum = width // 2, 4 * seq_len
    periods = {"base": 1, "fast": 1, "mid": 4, "slow": 6}
    return {
        "output": folder / "out",
        "model.vocab_size": 512,
        "model.width": width,
        "model.num_layers": 2,
        "model.head_dim": head,
        "model.memory_hidden": head,
        "data.prefix": folder / "corpus",
        "data.cache_dir": folder / "cache",
        "data.seq_len": seq_len,
        "levels.quantum_tokens": quantum,
        **{f"levels.levels.{name}.period_tokens": n * quantum for name, n in periods.items()},
        "levels.levels.slow.offload": True,
        "levels.schedule.warmup_tokens": quantum,
        "levels.fold_every_tokens": num_quanta // 6 * quantum,
        "checkpoint.url": folder / "runs",
        "checkpoint.every_tokens": num_quanta // 6 * quantum,
        "checkpoint.every_minutes": 0,
        "train.total_tokens": num_quanta * quantum,
        "train.micro_batch_size": 2,
        "train.validate_every_tokens": num_quanta // 2 * quantum,
        "train.validation_sequences": 8,
        "train.sample_tokens": 16,
        "train.reference_max_tokens": 0,
        "track.log_every_quanta": 1,
        "track.wandb": "off",
        "cluster.max_workers": 1,
        "cluster.min_workers": 1,
        "cluster.device": device,
        "cluster.allocator": "expandable_segments:True" if device == "cuda" else "",
    }


def prepare(folder: Path, seq_len: int) -> None:
    """About 0.1M tokens of the standard library's source, as a dataset in the folder."""
    from nltrain.data import train_tokenizer
    from nltrain.data.prepare import PrepareConfig, stdlib_corpus
    from nltrain.data.prepare import prepare as write
    from nltrain.store import open_store

    documents = [document for document in stdlib_corpus(max_bytes=250_000) if document.text.strip()]
    tokenizer = train_tokenizer([document.text for document in documents], vocab_size=512)
    write(documents, open_store(str(folder / "corpus")), tokenizer, PrepareConfig(seq_len, validation_fraction=0.1))


def config_of(values: dict[str, Any], name: str, **changes: Any) -> Any:
    """The run `name`: the job's recipe with `values`, and with `changes`, whose dots are written as two underscores."""
    from jobs.paper import paper_run
    from nltrain.config import override

    recipe = paper_run(name, "160m", 2**30, 2**24, lr=1e-3, workers=2, micro_batch_size=2)
    every = values | {key.replace("__", "."): value for key, value in changes.items()}
    every["output"] = Path(every["output"]) / name
    return override(recipe, [f"{key}={value}" for key, value in every.items()])


def work(values: dict[str, Any], out: Path, kill_at_tokens: int | None, environment: dict[str, str]) -> None:
    """One run in a process of its own; `out` gets its result, or its traceback. Kills itself at `kill_at_tokens`."""
    os.environ.update(environment)
    sys.stdout = out.with_suffix(".log").open("w")  # as long as the process
    import torch
    import torch.distributed as dist

    from nltrain.config import RunConfig, from_dict
    from nltrain.loop import train
    from nltrain.supervision import TRAINING, Unsupervised

    class Killed(Unsupervised):
        """Sends itself SIGKILL in the middle of a quantum."""

        def beat(self, phase: str, tokens: int) -> None:
            """Called by the loop, before each micro-step too."""
            if kill_at_tokens is not None and phase == TRAINING and tokens >= kill_at_tokens:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        config = from_dict(RunConfig, values)
        on_gpu = config.cluster.device == "cuda"
        if on_gpu:
            torch.cuda.set_device(0)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        result: dict[str, Any] = {"summary": train(config, Killed(time.time()))}
        if on_gpu:
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        dist.destroy_process_group()
    except BaseException:
        result = {"error": traceback.format_exc()}
    out.write_text(json.dumps(result))


class Runs:
    """Starts runs in `folder` on a device and reads what they left."""

    def __init__(self, folder: Path, device: str, quick: bool) -> None:
        self.folder, self.device, self.values = folder, device, settings(folder, device, quick)
        self._started = 0

    def run(self, name: str, kill_at_tokens: int | None = None, **changes: Any) -> dict[str, Any]:
        """The result of one process that works on run `name`; empty for one that was killed. Raises PartFailed."""
        from nltrain.config import to_dict

        self._started += 1
        out = self.folder / f"{name}-{self._started}.json"
        environment = {"LOCAL_RANK": "0", "DS_ACCELERATOR": self.device}
        arguments = (to_dict(config_of(self.values, name, **changes)), out, kill_at_tokens, environment)
        process = self._process(arguments)
        process.start()
        process.join(RUN_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
            raise PartFailed(f"{name}: not done within {RUN_TIMEOUT_S:.0f} s")
        if kill_at_tokens is not None and process.exitcode == -signal.SIGKILL:
            return {}
        if not out.exists():
            raise PartFailed(f"{name}: the process ended with {process.exitcode} and left no result")
        result = json.loads(out.read_text())
        if "error" in result:
            raise PartFailed(f"{name}: {result['error'][-2000:]}")
        return result

    def _process(self, arguments: tuple[Any, ...]) -> Any:
        if self.device == "cuda":  # a forked process cannot use a GPU
            return multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        from benchmarks._forked import CONTEXT

        return CONTEXT.Process(target=work, args=arguments)

    def rows(self, name: str, kind: str) -> list[Any]:
        """The rows of a kind that count, in order."""
        from nltrain.track.metrics import effective, read_rows

        return [row for row in effective(read_rows(self.folder / "out" / name)) if row["kind"] == kind]

    def losses(self, name: str) -> list[float]:
        """Of every quantum."""
        return [row["loss"] for row in self.rows(name, "step")]


def check_resume(runs: Runs) -> dict[str, Any]:
    """A run that is killed and started again equals one that is not, to the bit."""
    total = int(runs.values["train.total_tokens"])
    whole = runs.run("undisturbed")["summary"]
    if runs.run("killed", kill_at_tokens=total * 7 // 12):
        raise PartFailed("killed: the run ended before it was to be killed")
    again = runs.run("killed")["summary"]
    same = {
        "weights": again["weights_sha256"] == whole["weights_sha256"],
        "losses": runs.losses("killed") == runs.losses("undisturbed"),
        "validation": again["val_loss"] == whole["val_loss"],
        "sample": [r["text"] for r in runs.rows("killed", "sample")]
        == [r["text"] for r in runs.rows("undisturbed", "sample")],
    }
    if not all(same.values()):
        raise PartFailed(f"the resumed run differs: {same}")
    attempts = runs.rows("killed", "attempt")
    return {
        "quanta": len(runs.losses("undisturbed")),
        "resumed_at_tokens": attempts[-1]["tokens"],
        "loss_first": whole["loss_first"],
        "loss_last": whole["loss_last"],
        "val_loss": whole["val_loss"],
        "tokens_per_s": whole["tokens_per_s"],
        "checkpoints": whole["checkpoints"],
    }


def check_stages(runs: Runs) -> dict[str, Any]:
    """Every level at ZeRO 1, 2 and 3: equal losses within STAGES_BOUND."""
    total = int(runs.values["train.total_tokens"])
    last = {}
    for stage in STAGES:
        name = f"zero{stage}"
        every = {f"levels__levels__{level}__zero_stage": stage for level in ("base", "fast", "mid", "slow")}
        part = {"train__total_tokens": total // 6, "train__sample_tokens": 0}
        runs.run(name, **every, **part)
        last[name] = runs.losses(name)[-1]
    spread = max(last.values()) / min(last.values()) - 1
    if not spread <= STAGES_BOUND:
        raise PartFailed(f"the last losses differ by {spread:.2%}: {last}")
    return {"loss_last": last, "spread": spread}


def check_memory(runs: Runs) -> dict[str, Any]:
    """160m for three quanta: what the device held at most, over plan and activations."""
    if runs.device != "cuda":
        return {"skipped": "not measured without a GPU"}
    import torch

    from benchmarks.memory import micro_step
    from nltrain.levels.split import split_levels
    from nltrain.model import build
    from nltrain.plan import level_bytes

    seq_len = int(runs.values["data.seq_len"])
    quantum = 4 * seq_len
    sizes = {"model__width": 768, "model__num_layers": 16, "model__head_dim": 128, "model__memory_hidden": 128}
    short = {"train__total_tokens": 3 * quantum, "train__sample_tokens": 0, "levels__levels__slow__offload": False}
    config = config_of(runs.values, "memory", **sizes, **short)
    with torch.device("meta"):
        parts = split_levels(build(config.model), config.levels.resolved())
    state = sum(level_bytes(part, 2, 1, config.levels.measure_changes).total for part in parts)
    predicted = state + micro_step(config.model, config.train.micro_batch_size, seq_len).peak
    measured = runs.run("memory", **sizes, **short)["peak_bytes"]
    found = {"measured_gb": measured / 1e9, "predicted_gb": predicted / 1e9, "ratio": measured / predicted}
    if not MEMORY_BOUNDS[0] <= found["ratio"] <= MEMORY_BOUNDS[1]:
        raise PartFailed(f"memory against the plan: {found}")
    return found


CHECKS: dict[str, Callable[[Runs], dict[str, Any]]] = {
    "resume": check_resume,
    "stages": check_stages,
    "memory": check_memory,
}


def check(device: str, quick: bool, skip: tuple[str, ...], out: Path | None) -> dict[str, dict[str, Any]]:
    """{part: its figures, with "ok", "skipped" or "failed"}; a part that fails does not hide the others.

    out: gets what there is after each part.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return {part: {"skipped": f"not installed: {', '.join(missing)}"} for part in PARTS}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nltrain-gpu-") as folder:
        runs = Runs(Path(folder), device, quick)
        prepare(Path(folder), int(runs.values["data.seq_len"]))
        for part in PARTS:
            began_s = time.monotonic()
            try:
                result = {"skipped": "by choice"} if part in skip else CHECKS[part](runs)
                found[part] = {"ok": "skipped" not in result} | result
            except Exception as error:
                text = str(error) if isinstance(error, PartFailed) else traceback.format_exc()
                found[part] = {"ok": False, "failed": text}
            found[part]["seconds"] = round(time.monotonic() - began_s, 1)
            print(describe(part, found[part]), flush=True)
            if out:
                out.write_text(json.dumps(found, indent=1))
    return found


def describe(part: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in result:
        return f"job, {part:8} FAILED: {result['failed']}"
    if "skipped" in result:
        return f"job, {part:8} skipped: {result['skipped']}"
    figures = ", ".join(f"{key} {value}" for key, value in result.items() if key not in ("ok", "seconds"))
    return f"job, {part:8} ok in {result['seconds']} s: {figures}"


def main() -> int:
    """Runs the parts; returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="12 quanta of a narrower model")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu proves the same code")
    parser.add_argument("--skip", nargs="*", default=(), choices=PARTS, help="parts to leave out")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = args.device  # read when deepspeed is imported
    found = check(args.device, args.quick, tuple(args.skip), args.out)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    if args.json:
        print(json.dumps(found))
    return 1 if any("failed" in result for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
