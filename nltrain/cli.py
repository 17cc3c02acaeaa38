"""The `nltrain` command: looks at runs and checkpoints. Each command is a function in the room that it belongs to.

Training itself is started with `ray job submit -- python jobs/...`.
"""

import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltrain.config import RunConfig

COMMANDS = {
    "status": ("nltrain.runtime.status:status_main", "what a run is doing: tokens, loss, checkpoint, restarts, levels"),
    "list": ("nltrain.checkpoint.tools:list_main", "the checkpoints of a run"),
    "verify": ("nltrain.checkpoint.tools:verify_main", "check that checkpoints are what was saved"),
    "export": ("nltrain.checkpoint.tools:export_main", "the weights of a checkpoint as safetensors"),
    "sizes": ("nltrain.cli:sizes_main", "how many of N workers a job would use, and how fast, for N = 1, 2, ..."),
    "doctor": ("nltrain.runtime.doctor:doctor_main", "whether a Ray cluster is fit for a run; runs on the cluster"),
    "plan": ("nltrain.cli:plan_main", "the resolved config and the plan of a job file, without training"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nltrain COMMAND [...]; nltrain COMMAND --help says more\n")
        print("\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if arguments else 2
    name = arguments.pop(0)
    if name not in COMMANDS:
        print(f"error: nltrain {name}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return run(arguments)


def plan_main(arguments: Sequence[str]) -> int:
    """nltrain plan jobs/hope_1p3b.py [field=value ...]; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nltrain plan JOB_FILE [field=value ...]")
        return 0 if arguments else 2
    from nltrain.runtime.launch import main as job_main

    config = _config_of(arguments[0])
    return 1 if config is None else job_main(config, ["--dry-run", *arguments[1:]])


def sizes_main(arguments: Sequence[str]) -> int:
    """nltrain sizes jobs/hope_1p3b.py [N] [field=value ...]; returns the exit code."""
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nltrain sizes JOB_FILE [N] [field=value ...]; N: the last line of the table, 256 by default")
        return 0 if arguments else 2
    from nltrain.config import override
    from nltrain.levels.quantum import size_table

    config = _config_of(arguments.pop(0))
    if config is None:
        return 1
    last = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 256
    try:
        config = override(config, arguments)
        num_sequences = config.quantum_tokens // config.data.seq_len
        print(size_table(num_sequences, config.train.micro_batch_size, last))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _config_of(path: str) -> "RunConfig | None":
    """The `config` of a job file; None, and a line that says why, where there is none."""
    try:
        found = runpy.run_path(path)
    except OSError as error:
        print(f"error: {path}: {error.strerror}; name a file such as jobs/hope_tiny.py", file=sys.stderr)
        return None
    if "config" not in found:
        print(f"error: {path} defines no `config`: name a job such as jobs/hope_tiny.py", file=sys.stderr)
        return None
    return found["config"]


if __name__ == "__main__":
    sys.exit(main())
