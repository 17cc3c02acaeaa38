"""The cluster: a lost node, a returned one, and faults at random in one run, on three raylets of this machine.

    python -m benchmarks.cluster [--json] [--quick]

Real `ray start`, `ray job submit`, raylets, workers and an S3 server behind a proxy that can be cut. First a run loses
a node and gets it back, then it meets faults of every kind in an order drawn from a seed; it is stopped, submitted
again and ends. The last fault is a node on which a rank dies at each start: a run of its own has to leave it out and
end. Another run of the same config, never disturbed while two other processes keep the cores busy, gives
the loss curve to compare with, and must see no restart. --json prints one JSON object as the last line; the exit code
is 1 when a bound of BOUNDS is missed. --quick: two faults, and a shorter quiet run.
"""

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nltrain.local.drill import DIE_ON_BAD_NODE, QUANTUM, Drill, DrillError, TrainingJob, planted
from nltrain.runtime.status import read_status
from nltrain.track.goodput import goodput
from nltrain.track.metrics import effective

INTERVAL = 32 * QUANTUM  # tokens between checkpoints
ENDLESS = 1_000_000  # quanta
SURVIVE_S = 240.0  # a fault is survived when training goes on within this time, on whatever this machine is
KINDS = ("kill_worker", "kill_raylet", "hang", "drain", "cut_store")
COMPARED_QUANTA = 400
QUIET_S = {True: 30.0, False: 600.0}  # by --quick

BOUNDS: dict[str, Callable[[Any], bool]] = {
    "recover_s": lambda x: x <= 60,
    "grow_back_s": lambda x: x <= 90,
    "tokens_wasted": lambda x: x <= INTERVAL,
    "faults_missed": lambda x: x == 0,
    "bad_node_left_out": lambda x: x is True,
    "bad_node_run_right": lambda x: x is True,
    "samples_lost": lambda x: x == 0,
    "samples_repeated": lambda x: x == 0,
    "ticks_right": lambda x: x is True,
    "right_number_of_tokens": lambda x: x is True,
    "goodput_accounted": lambda x: x >= 0.97,
    "max_loss_difference": lambda x: x <= 1e-4,
    "false_alarms": lambda x: x == 0,
    "processes_left": lambda x: x == 0,
}

SETTINGS = {
    "levels__fold_every_tokens": INTERVAL,
    "checkpoint__every_tokens": INTERVAL,
    # A stopped run is submitted again with its end in sight; nothing else depends on where the end is.
    "checkpoint__may_change": "train.total_tokens,levels.schedule.total_tokens",
    "levels__schedule__kind": "constant",
    "cluster__hang_timeout_s": 15,
    "cluster__max_failures": 100,
    # The faults are dealt by us: no node is to blame.
    "cluster__max_node_strikes": 0,
}
BAD_NODE_QUANTA = 40


class Faults:
    """What is done to a running job; each returns when the fault has been dealt."""

    def __init__(self, drill: Drill, job: TrainingJob, seed: int) -> None:
        self.drill, self.job = drill, job
        self.random = random.Random(seed)

    def deal(self, kind: str) -> float:
        """One fault and the wait until training goes on with all nodes; returns seconds until it went on at all."""
        attempts = len(self.job.rows("attempt"))
        begun_s = time.time()
        match kind:
            case "kill_worker":
                self.job.kill_rank(self._rank())
            case "hang":
                self.job.kill_rank(self._rank(), signal.SIGSTOP)
            case "kill_raylet":
                self._node().kill()
            case "drain":
                node = self._node()
                self.drill.drain(node, grace_s=30)
            case "cut_store":
                with self.drill.store_cut():
                    time.sleep(20)
        if kind == "cut_store":
            self._until_further(begun_s + 20)
        else:
            self.job.wait_until(f"another attempt after {kind}", lambda: self._goes_on(attempts), SURVIVE_S)
        seconds = time.time() - begun_s
        if kind in ("kill_raylet", "drain"):
            if kind == "drain":
                node.stop()
            self.drill.cluster.add_node(1)
        self.job.wait_for_attempt(SURVIVE_S, workers=self.drill.num_nodes)
        return seconds

    def _rank(self) -> int:
        return self.random.choice(sorted(self.job.ranks()))

    def _node(self) -> Any:
        return self.random.choice([node for node in self.drill.nodes if node.alive])

    def _goes_on(self, attempts: int) -> bool:
        rows = self.job.rows("attempt")
        if len(rows) <= attempts:
            return False
        return any(step["attempt"] == rows[-1]["attempt"] for step in self.job.rows("step"))

    def _until_further(self, since_s: float) -> None:
        """Training goes on after the store is back, further than it had been."""
        before = max(step["tokens"] for step in self.job.rows("step") if step["time_s"] <= since_s)
        self.job.wait_until("further steps", lambda: self.job.tokens() > before, SURVIVE_S)


def lose_and_regain(drill: Drill, job: TrainingJob) -> dict[str, Any]:
    """kill -9 of a raylet in the middle of training, then another node joins."""
    job.wait_for_attempt(240, workers=drill.num_nodes)
    committed = job.wait_until("a checkpoint", lambda: job.rows("checkpoint"), 120)[-1]
    job.wait_for_tokens(committed["saved_tokens"] + INTERVAL // 2, 120)
    killed_s = time.time()
    drill.nodes[0].kill()
    recovered = job.wait_for_attempt(SURVIVE_S, workers=drill.num_nodes - 1)
    added_s = time.time()  # the joining of the raylet itself is part of growing back
    drill.cluster.add_node(1)
    grown = job.wait_for_attempt(SURVIVE_S, workers=drill.num_nodes)
    return {
        "recover_s": round(recovered["first_step_s"] - killed_s, 1),
        "grow_back_s": round(grown["first_step_s"] - added_s, 1),
        "tokens_wasted": recovered["tokens_lost"] + grown["tokens_lost"],
        "checkpoint_interval_tokens": INTERVAL,
    }


def meet_faults(drill: Drill, job: TrainingJob, number: int, seed: int) -> dict[str, Any]:
    """`number` faults, every kind equally often, in random order at random moments."""
    chosen = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(number)]
    chosen.shuffle(kinds)
    faults, dealt = Faults(drill, job, seed), []
    for kind in kinds:
        time.sleep(chosen.uniform(1.0, 6.0))
        seconds = faults.deal(kind)
        dealt.append({"kind": kind, "seconds": round(seconds, 1)})
        print(f"fault {len(dealt)} of {number}: {kind}, training again after {seconds:.1f} s", flush=True)
    return {"faults": number, "faults_survived": len(dealt), "faults_missed": number - len(dealt), "dealt": dealt}


def meet_bad_node(drill: Drill, folder: Path) -> dict[str, Any]:
    """A fourth node on which each rank dies in its first quantum; the run has to end without it."""
    begun_s = time.time()
    bad = drill.cluster.add_node(1, BAD_NODE="1")
    values = SETTINGS | {"cluster__max_workers": drill.num_nodes + 1, "cluster__max_node_strikes": 3}
    job = drill.train("bad-node", BAD_NODE_QUANTA, root=planted(folder, DIE_ON_BAD_NODE), **values)
    exit_code = job.wait(2 * SURVIVE_S)
    bad.stop()
    attempts = job.rows("attempt")
    steps = [row["step"] for row in effective(job.rows()) if row["kind"] == "step"]
    first = next((row["time_s"] for row in job.rows("step")), time.time())
    return {
        "bad_node_left_out": f"node {bad.name} is left out from now on: 3 strikes" in job.log,
        "bad_node_run_right": exit_code == 0
        and attempts[-1]["workers"] == drill.num_nodes
        and steps == list(range(1, BAD_NODE_QUANTA + 1)),
        "bad_node_s": round(first - begun_s, 1),
    }


def finish(drill: Drill, job: TrainingJob, name: str) -> tuple[TrainingJob, int]:
    """`ray job stop`, then the same run again with 20 quanta to go."""
    job.stop()
    job.wait(180)
    stopped = read_status(str(job.output))
    total = stopped["tokens"] // QUANTUM + 20
    again = drill.train(name, total, **SETTINGS)
    if again.wait(300):
        raise DrillError(f"{name} did not finish; its log ends with\n{again.log[-3000:]}")
    return again, total


def exactness(job: TrainingJob, total: int) -> dict[str, Any]:
    """Each quantum once, every level at its ticks, the right end."""
    rows = job.rows()
    steps = [row["step"] for row in effective(rows) if row["kind"] == "step"]
    end = rows[-1]
    sequences = QUANTUM // 64
    updates = end["level_updates"]
    right = all(count["done"] == count["due"] > 0 and count["skipped"] == 0 for count in updates.values())
    for name, count in updates.items():
        ticks = [row["tokens"] for row in effective(rows) if row["kind"] == "tick" and row["level"] == name]
        right &= len(ticks) == len(set(ticks)) == count["due"]
    report = goodput(rows)
    return {
        "samples_lost": (total - len(set(steps))) * sequences,
        "samples_repeated": (len(steps) - len(set(steps))) * sequences,
        "ticks_right": right,
        "right_number_of_tokens": end["reason"] == "finished" and end["tokens"] == total * QUANTUM,
        "goodput_accounted": report["accounted"],
        "goodput": report,
    }


def undisturbed(drill: Drill, quick: bool) -> tuple[TrainingJob, dict[str, Any]]:
    """The same run in peace, for its loss curve, with both cores kept busy by others."""
    spinners = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(2)]
    for spinner in spinners:
        spinner.start()
    try:
        job = drill.train("quiet", ENDLESS, **SETTINGS)
        job.wait_for_attempt(300, workers=drill.num_nodes)
        begun_s = time.time()
        quanta = 150 if quick else COMPARED_QUANTA
        job.wait_for_tokens(quanta * QUANTUM, 900)
        time.sleep(max(0.0, QUIET_S[quick] - (time.time() - begun_s)))
        minutes = (time.time() - begun_s) / 60
        found = {"quiet_minutes": round(minutes, 1), "false_alarms": len(job.rows("attempt")) - 1}
        job.stop()
        job.wait(180)
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.join()
    return job, found


def _spin() -> None:
    while True:
        pass


def loss_difference(one: TrainingJob, other: TrainingJob) -> dict[str, Any]:
    """Largest difference of the two loss curves, nats per token, where both have steps."""
    curves = [
        {row["step"]: row["loss"] for row in effective(job.rows()) if row["kind"] == "step"} for job in (one, other)
    ]
    both = sorted(curves[0].keys() & curves[1].keys())[:COMPARED_QUANTA]
    differences = [abs(curves[0][step] - curves[1][step]) for step in both]
    return {"steps_compared": len(both), "max_loss_difference": round(max(differences), 6)}


def main() -> int:
    """Run the story, print the figures; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="2 faults instead of 10 before the last, and a shorter quiet run"
    )
    parser.add_argument("--faults", type=int, help="how many; default 10, with --quick 2")
    parser.add_argument("--seed", type=int, default=0, help="order and moments of the faults")
    options = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nltrain-cluster-") as folder:
        with Drill(Path(folder) / "cluster", num_nodes=3) as drill:
            print(f"three nodes up after {time.monotonic() - started_s:.0f} s", flush=True)
            job = drill.train("faults", ENDLESS, **SETTINGS)
            found = lose_and_regain(drill, job)
            print(f"lost and regained a node: {found}", flush=True)
            found |= meet_faults(drill, job, options.faults or (2 if options.quick else 10), options.seed)
            job, total = finish(drill, job, "faults")
            found |= exactness(job, total)
            found |= meet_bad_node(drill, Path(folder))
            print(f"left a bad node out: {found['bad_node_left_out']}", flush=True)
            quiet, alarms = undisturbed(drill, options.quick)
            found |= alarms | loss_difference(job, quiet)
        found["processes_left"] = len(drill.owner.processes())
    found["seconds"] = round(time.monotonic() - started_s, 1)
    missed = [name for name, holds in BOUNDS.items() if not holds(found[name])]
    found["missed"] = missed
    for name, value in found.items():
        print(f"{name:28} {json.dumps(value)}" + ("   <- missed" if name in missed else ""), flush=True)
    if options.json:
        print(json.dumps(found), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
