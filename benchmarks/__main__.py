"""Every benchmark in turn: python -m benchmarks [--quick] [--json]. Exit code not 0 when one falls short."""

import pkgutil
import subprocess
import sys
from pathlib import Path

GPU_ONLY = ("gpu_check", "gpu_job", "gpu_kernels", "gpu_model")


def main() -> int:
    """Runs each benchmark in a process of its own. Returns 1 when one falls short."""
    folder = Path(__file__).parent
    names = [module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_")]
    short = []
    for name in names:
        if name in GPU_ONLY:
            print(f"== benchmarks.{name}: not run, needs a GPU (make gpu-check)", flush=True)
            continue
        print(f"== benchmarks.{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], cwd=folder.parent).returncode:
            short.append(name)
    print(f"fell short: {', '.join(short)}" if short else "none fell short")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
