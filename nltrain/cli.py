"""The `nltrain` command: looks at runs and checkpoints. Thin; each command is a function in the room it belongs to.

Training itself is started with `ray job submit -- python jobs/...`.
"""

import importlib
import runpy
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "status": ("nltrain.runtime.status:status_main", "what a run is doing: tokens, loss, checkpoint, restarts, levels"),
    "list": ("nltrain.checkpoint.tools:list_main", "the checkpoints of a run"),
    "verify": ("nltrain.checkpoint.tools:verify_main", "check that checkpoints are what was saved"),
    "export": ("nltrain.checkpoint.tools:export_main", "the weights of a checkpoint as safetensors"),
    "doctor": ("nltrain.runtime.doctor:doctor_main", "whether a Ray cluster is fit for a run; runs on the cluster"),
    "plan": ("nltrain.cli:plan_main", "the resolved config and the plan of a job file, without training"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nltrain COMMAND [...]; nltrain COMMAND --help tells more\n")
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
    """nltrain plan jobs/hope_1p3b.py [field=value ...]"""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nltrain plan JOB_FILE [field=value ...]")
        return 0 if arguments else 2
    from nltrain.runtime.launch import main as job_main

    try:
        found = runpy.run_path(arguments[0])
    except OSError as error:
        print(f"error: {arguments[0]}: {error.strerror}; name a file such as jobs/hope_tiny.py", file=sys.stderr)
        return 1
    if "config" not in found:
        print(f"error: {arguments[0]} defines no `config`: name a job such as jobs/hope_tiny.py", file=sys.stderr)
        return 1
    return job_main(found["config"], ["--dry-run", *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())
