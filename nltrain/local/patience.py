"""Waits longer than 30 s, Ray's own limit, for a node to start on a busy machine, and starts less on it.

Run as a file instead of the `ray` command, or call `be_patient` before `ray.init` in this process. The wait goes on
while the node's raylet lives, prints a line every SAY_EVERY_S, and ends after LIMIT_S. As a file it starts only the
parts of Ray's dashboard that jobs need. It imports nothing of this package, and two private names of Ray:
services.get_node, which is called until the new node is listed, and services.start_ray_process.

    python patience.py start --head ...
"""

import sys
import time
from typing import Any

LIMIT_S = 900.0
# What takes jobs, and what says whether an actor lives. Each part of the dashboard is a process of its own.
DASHBOARD_PARTS = "JobHead,StateHead"
SAY_EVERY_S = 20.0


def be_patient(limit_s: float = LIMIT_S) -> None:
    """Make Ray wait for its node for up to `limit_s` in this process; may be called twice."""
    from ray._private import services

    if getattr(services.get_node, "is_patient", False):
        return
    ask, others = services.get_node, _raylets()  # of other clusters that this process has started

    def get_node(*arguments: Any, **options: Any) -> Any:
        began_s = said_s = time.monotonic()
        while True:
            try:
                return ask(*arguments, **options)
            except RuntimeError:
                now_s = time.monotonic()
                if now_s - began_s > limit_s or not _raylets() - others:
                    raise
                if now_s - said_s > SAY_EVERY_S:
                    said_s = now_s
                    print(f"Ray is starting, {now_s - began_s:.0f} s so far: the machine is busy", flush=True)
                time.sleep(0.3)

    get_node.is_patient = True  # type: ignore[attr-defined]
    services.get_node = get_node


def start_less() -> None:
    """Make Ray start only DASHBOARD_PARTS of its dashboard in this process."""
    from ray._private import ray_constants, services

    start = services.start_ray_process

    def start_ray_process(command: list[str], process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            command = [*command, f"--modules-to-load={DASHBOARD_PARTS}"]
        return start(command, process_type, *arguments, **options)

    services.start_ray_process = start_ray_process


def _raylets() -> set[int]:
    """The pids of the raylets that run below this process."""
    import psutil

    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("raylet") and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


if __name__ == "__main__":
    be_patient()
    start_less()
    from ray.scripts.scripts import main

    sys.exit(main())
