"""Watches one rank from a process of its own: it dumps and kills a rank without progress, and Ray restarts the group.

The rank writes each sign of life into 64 shared bytes. The watchdog counts the time since the last one, but only the
time in which it was itself awake: a machine that stood still raises no alarm. It needs no help from the rank, which may
be stopped or stuck in a collective or a read. It ends with the rank. It is started as a file and imports only the
standard library until it has something to report.

    python watchdog.py '{"heart_fd": 5, "pid": 123, "rank": 0, ...}'
"""

import contextlib
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HEART = struct.Struct("<qqd32s")  # beats, tokens, limit in seconds, phase
COLLECTIVES = struct.Struct("<q")  # behind it: collectives that the rank has joined
HEART_BYTES = HEART.size + COLLECTIVES.size
# Between the note and the kill: all ranks of one hang note it, before the death of one ends the others.
GRACE_S = 3.0
WORD_TIMEOUT_S = 5.0
DUMP_TIMEOUT_S = 20.0
REPORT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Watch:
    """What a watchdog needs to know; it arrives as JSON on the command line."""

    heart_fd: int
    dump_fd: int
    """The file to which the rank's faulthandler writes on SIGUSR1."""
    pid: int
    rank: int
    folder: str
    store_url: str
    run: str

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Stuck:
    """The state of a rank whose time limit has passed."""

    silent_s: float
    beats: int
    tokens: int
    phase: str
    collectives: int
    process_state: str


def watch(config: Watch, poll_s: float = 0.5) -> bool:
    """Returns when the rank has ended (False), or was stuck and has been killed (True)."""
    heart = mmap.mmap(config.heart_fd, HEART_BYTES)
    last_beats, silent_s, seen_s = -1, 0.0, time.monotonic()
    while os.getppid() == config.pid:
        time.sleep(poll_s)
        now_s = time.monotonic()
        awake_s, seen_s = min(now_s - seen_s, 2 * poll_s), now_s
        beats, tokens, limit_s, phase = HEART.unpack_from(heart)
        if beats < 0:
            return False  # the rank has closed its supervision
        if beats != last_beats:
            last_beats, silent_s = beats, 0.0
            continue
        silent_s += awake_s
        if silent_s > limit_s and os.getppid() == config.pid:
            name = phase.rstrip(b"\0").decode(errors="replace")
            (collectives,) = COLLECTIVES.unpack_from(heart, HEART.size)
            stuck = Stuck(round(silent_s, 1), beats, tokens, name, collectives, process_state(config.pid))
            note_stuck(config, stuck)
            time.sleep(GRACE_S)
            if os.getppid() == config.pid and HEART.unpack_from(heart)[0] == beats:
                act(config, stuck)
                return True
            last_beats, silent_s, seen_s = -1, 0.0, time.monotonic()
    return False


def note_stuck(config: Watch, stuck: Stuck) -> None:
    """Note beside the run's checkpoints that this rank is stuck, and where. Best effort, with a short timeout."""
    find_modules()
    from nltrain.store import StoreError, open_store
    from nltrain.track.events import put_event

    store = open_store(config.store_url, attempts=1, timeout_s=WORD_TIMEOUT_S)
    try:
        put_event(store, config.run, "stuck", f"rank_{config.rank:04d}", rank=config.rank, **asdict(stuck))
    except StoreError as error:
        print(f"rank {config.rank} is stuck and could not say so: {error}", flush=True)


def act(config: Watch, stuck: Stuck) -> None:
    """Dump the stacks to the run's folder, kill the rank, and note the event beside the run's checkpoints."""
    stacks = dump_stacks(config)
    path = Path(config.folder, "watchdog", f"{time.strftime('%Y%m%d-%H%M%S')}-rank_{config.rank:04d}.txt")
    who = f"rank {config.rank} (pid {config.pid}, {stuck.process_state})"
    head = f"{who} made no progress for {stuck.silent_s:.0f} s while {stuck.phase} at {stuck.tokens:,} tokens\n\n"
    where = str(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + stacks)
    except OSError as error:  # a full disk must not keep a hung rank alive
        where = f"nowhere ({error})"
    with contextlib.suppress(ProcessLookupError):
        os.kill(config.pid, signal.SIGKILL)
    print(head.strip() + f"; killed; stacks in {where}", flush=True)
    signal.alarm(int(REPORT_TIMEOUT_S))  # a store that hangs must not keep this process for ever
    find_modules()
    from nltrain.store import open_store
    from nltrain.track.events import put_event

    values = asdict(stuck) | {"rank": config.rank, "stacks": where, "text": stacks[:20000]}
    put_event(open_store(config.store_url), config.run, "hang", f"rank_{config.rank:04d}", **values)


def find_modules() -> None:
    """Let the run's own modules be imported: this file is started alone."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)


def process_state(pid: int) -> str:
    """The state as the kernel names it: "T (stopped)", "D (disk sleep)"; "?" where there is no /proc."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    except OSError:
        return "?"
    return "?"


def dump_stacks(config: Watch) -> str:
    """Python stacks of all threads, read by py-spy from outside, or else written by the rank's faulthandler."""
    beside = Path(sys.executable).parent / "py-spy"
    py_spy = str(beside) if beside.exists() else shutil.which("py-spy")
    why = "py-spy is not installed"
    if py_spy:
        # Without --nonblocking py-spy would first stop a process that may be stopped already.
        command = [py_spy, "dump", "--nonblocking", "--pid", str(config.pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_TIMEOUT_S)
            if done.returncode == 0:
                return done.stdout
            why = done.stderr.strip()
        except (subprocess.TimeoutExpired, OSError) as error:
            why = str(error)
    with contextlib.suppress(ProcessLookupError):
        os.kill(config.pid, signal.SIGUSR1)
    time.sleep(2.0)
    text = os.pread(config.dump_fd, 1 << 20, 0).decode(errors="replace")
    return f"py-spy could not look ({why}); faulthandler says:\n{text or 'nothing: the process does not run'}\n"


if __name__ == "__main__":
    watch(Watch(**json.loads(sys.argv[1])))
