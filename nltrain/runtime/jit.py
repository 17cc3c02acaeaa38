"""DeepSpeed loads its C++ op under a lock file; a process killed inside leaves it, and the next one waits for ever.

Called before DeepSpeed is imported on a worker. Loading a built op takes well under a second and building one 30 s, so
a lock that stands for `STALE_AFTER_S` belongs to nobody any more.
"""

import os
import time
from pathlib import Path

STALE_AFTER_S = 120.0


def clear_stale_locks(stale_after_s: float = STALE_AFTER_S) -> list[Path]:
    """Wait for each lock below TORCH_EXTENSIONS_DIR to go or grow stale, and remove the stale ones; returns those."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    removed: list[Path] = []
    for lock in Path(folder).rglob("lock") if folder else []:
        while (age_s := _age_s(lock)) is not None:
            if age_s > stale_after_s:
                lock.unlink(missing_ok=True)
                print(f"removed a stale build lock, {age_s:.0f} s old: {lock}", flush=True)
                removed.append(lock)
                break
            time.sleep(min(1.0, stale_after_s / 10))
    return removed


def _age_s(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None  # its owner finished
