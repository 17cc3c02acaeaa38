"""Everything that a GPU can show, in one command, one JSON and one table. `make gpu-check` runs it.

    python -m benchmarks.gpu_check [--json] [--quick] [--device cuda|cpu] [--skip PART ...] [--minutes M] [--out FILE]

The first part needs CUDA, torch, triton and pytest alone; what a part lacks is said. Parts, each a process of its own
with a limit of time, so that one that fails, hangs or breaks the device does not hide the others:

    tests    tests/kernels and tests/model on the device
    kernels  python -m benchmarks.gpu_kernels: the memories alone, their speed and their error against float64
    model    python -m benchmarks.gpu_model: training speed and memory
    job      python -m benchmarks.gpu_job: the real loop, where deepspeed is installed

--device cpu --quick proves the machinery without a GPU; its figures mean nothing else.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What each part may take of the whole.
MINUTES = 8.0
SHARES = {"tests": 0.33, "kernels": 0.12, "model": 0.30, "job": 0.25}
MISSING = 2  # exit code of a part that found no device


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    command: tuple[str, ...]
    """arguments of Python"""
    limit_s: float
    """after which it is ended"""
    writes_json: bool = True
    """whether it takes --out and fills that file"""
    skipped: str = ""
    """why it is not run; empty: it is"""


def parts_of(device: str, quick: bool, skip: tuple[str, ...], minutes: float = MINUTES) -> list[Part]:
    """The parts, in order; together they may take `minutes`."""
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/model")
    if quick:
        tests += ("-k", "rows_per_piece or layers_share")
    common = ("--device", device, *(("--quick",) if quick else ()))
    share = {name: fraction * minutes * 60 for name, fraction in SHARES.items()}

    def budget(name: str) -> tuple[str, str]:
        """Seconds for its measurements: the rest of its share is for building and compiling."""
        return "--budget-s", f"{0.7 * share[name]:.0f}"

    parts = [
        Part("tests", tests, share["tests"], writes_json=False),
        Part("kernels", ("-m", "benchmarks.gpu_kernels", *common, *budget("kernels")), share["kernels"]),
        Part("model", ("-m", "benchmarks.gpu_model", *common, *budget("model")), share["model"]),
        Part("job", ("-m", "benchmarks.gpu_job", *common), share["job"]),
    ]
    if find_spec("pytest") is None:
        parts[0] = Part("tests", tests, 0, False, "pytest is not installed")
    return [
        Part(part.name, part.command, part.limit_s, part.writes_json, "by choice") if part.name in skip else part
        for part in parts
    ]


def read_json(text: str) -> Any:
    """What the JSON text holds; None where it is none, or was cut off when its process was ended."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def run(part: Part, device: str, folder: Path) -> dict[str, Any]:
    """What came of the part: "status" (ok, failed, skipped), "seconds", and its JSON as "result"."""
    if part.skipped:
        return {"status": "skipped", "reason": part.skipped}
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [sys.executable, *part.command, *(("--out", str(out)) if part.writes_json else ())]
    environment = os.environ | {"NLTRAIN_TEST_DEVICE": device, "DS_ACCELERATOR": device}
    began_s, reason = time.monotonic(), ""
    with log.open("w") as written:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(part.limit_s)
            if code:
                reason = "no device" if code == MISSING else f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"not done within {part.limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it has started hold the device, too
            process.wait()
    text = log.read_text(errors="replace")
    print(text, end="", flush=True)
    found = {"status": "failed" if reason else "ok", "seconds": round(time.monotonic() - began_s, 1)}
    result = read_json(out.read_text()) if out.exists() else None
    if reason:
        found |= {"reason": reason, "log_ends_with": text[-2000:]}
    return found if result is None else found | {"result": result}


def check(parts: list[Part], device: str) -> dict[str, dict[str, Any]]:
    """{part: what came of it}."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="nltrain-gpu-check-") as folder:
        for part in parts:
            print(f"== {part.name}", flush=True)
            found[part.name] = run(part, device, Path(folder))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line per part."""
    lines = ["part      status    seconds  why"]
    for name, result in found.items():
        seconds = f"{result['seconds']:.1f}" if "seconds" in result else "-"
        lines.append(f"{name:8}  {result['status']:8}  {seconds:>7}  {result.get('reason', '')}")
    return "\n".join(lines)


def main() -> int:
    """Runs the parts; returns 1 when one failed, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="few tests, one narrow layer, 12 quanta")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only proves the machinery")
    parser.add_argument("--skip", nargs="*", default=(), choices=tuple(SHARES), help="parts to leave out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"gpu-check: no CUDA device here (torch {torch.__version__}): nothing was tested or measured. "
                  "Run it on a machine with a GPU and a CUDA build of torch.")  # fmt: skip
            return MISSING
    found = check(parts_of(args.device, args.quick, tuple(args.skip), args.minutes), args.device)
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    if args.json:
        print(json.dumps(found))
    return 1 if any(result["status"] == "failed" for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
