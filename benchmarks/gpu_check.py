"""Everything that a GPU can show, in one command, one JSON and one table. `make gpu-check` runs it.

    python -m benchmarks.gpu_check [--json] [--quick] [--device cuda|cpu] [--skip PART ...] [--out FILE]

The first part needs CUDA, torch, triton and pytest alone; what a part lacks is said. Parts, each a process of its own
with a limit of time, so that one that fails, hangs or breaks the device does not hide the others:

    tests    tests/kernels and tests/model on the device
    kernels  python -m benchmarks.kernels, where there is one
    model    python -m benchmarks.gpu_model: training speed and memory
    job      python -m benchmarks.gpu_job: the real loop, where deepspeed is installed

--device cpu --quick proves the machinery without a GPU; its figures mean nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MISSING = 2  # exit code of a part that found no device


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    command: tuple[str, ...]
    """arguments of Python"""
    limit_s: float
    """of 480 s for all"""
    writes_json: bool = True
    """whether it takes --out and fills that file"""
    skipped: str = ""
    """why it is not run; empty: it is"""


def parts_of(device: str, quick: bool, skip: tuple[str, ...]) -> list[Part]:
    """The parts, in order."""
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/model")
    if quick:
        tests += ("-k", "rows_per_piece or layers_share")
    common = ("--device", device, *(("--quick",) if quick else ()))
    has_kernels = (ROOT / "benchmarks" / "kernels.py").exists()
    parts = [
        Part("tests", tests, 150, writes_json=False),
        Part("kernels", ("-m", "benchmarks.kernels", "--json"), 60, False, "" if has_kernels else "there is none yet"),
        Part("model", ("-m", "benchmarks.gpu_model", *common, "--budget-s", "20" if quick else "110"), 140),
        Part("job", ("-m", "benchmarks.gpu_job", *common), 120),
    ]
    if find_spec("pytest") is None:
        parts[0] = Part("tests", tests, 0, False, "pytest is not installed")
    return [
        Part(part.name, part.command, part.limit_s, part.writes_json, "by choice") if part.name in skip else part
        for part in parts
    ]


def last_json(text: str) -> Any:
    """The JSON object in the last line of `text`, or None."""
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def run(part: Part, device: str, folder: Path) -> dict[str, Any]:
    """What came of the part: "status" (ok, failed, skipped), "seconds", and its JSON as "result"."""
    if part.skipped:
        return {"status": "skipped", "reason": part.skipped}
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [sys.executable, *part.command, *(("--out", str(out)) if part.writes_json else ())]
    environment = os.environ | {"NLTRAIN_TEST_DEVICE": device, "DS_ACCELERATOR": device}
    began_s, reason, text = time.monotonic(), "", ""
    try:
        with log.open("w") as written:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=written, stderr=subprocess.STDOUT, timeout=part.limit_s
            )
        if done.returncode:
            reason = "no device" if done.returncode == MISSING else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"not done within {part.limit_s:.0f} s"
    text = log.read_text(errors="replace")
    print(text, end="", flush=True)
    found = {"status": "failed" if reason else "ok", "seconds": round(time.monotonic() - began_s, 1)}
    result = json.loads(out.read_text()) if out.exists() else last_json(text)
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
    parser.add_argument("--skip", nargs="*", default=(), help="parts to leave out: tests, kernels, model, job")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(f"gpu-check: no CUDA device here (torch {torch.__version__}): nothing was tested or measured. "
                  "Run it on a machine with a GPU and a CUDA build of torch.")  # fmt: skip
            return MISSING
    found = check(parts_of(args.device, args.quick, tuple(args.skip)), args.device)
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    if args.json:
        print(json.dumps(found))
    return 1 if any(result["status"] == "failed" for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
