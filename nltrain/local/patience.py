"""Waits longer than 30 s, Ray's own limit, for a node to start on a busy machine.

Run as a file instead of the `ray` command, or call `be_patient` before `ray.init` in this process. The wait goes on
while the node's raylet lives, prints a line every SAY_EVERY_S, and ends after LIMIT_S. It imports nothing of this
package, and one private name of Ray: services.get_node, which is called until the new node is listed.

    python patience.py start --head ...
"""

import sys
import time
from typing import Any

LIMIT_S = 900.0
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
    from ray.scripts.scripts import main

    sys.exit(main())
