"""A run on three raylets, by the commands a user types: it loses a node, gets it back, is stopped, resumed, and hangs.

The story is lived through once; each test looks at one promise. Bounds hold for two quiet cores; where the cluster took
longer to start than it does there, they are longer by the same factor.
"""

import signal
import time
from dataclasses import dataclass

import pytest

from nltrain.local.drill import DIE_ON_BAD_NODE, QUANTUM, TrainingJob, planted
from nltrain.runtime.status import describe_status, read_status
from nltrain.store import open_store
from nltrain.track.events import read_events
from nltrain.track.goodput import goodput
from nltrain.track.metrics import effective

INTERVAL = 16 * QUANTUM  # tokens between checkpoints
ENDLESS = 20_000  # quanta


@dataclass
class Story:
    job: TrainingJob
    killed_s: float
    killed_at: int
    recovered: dict
    added_s: float
    grown: dict
    stopped: dict
    first_log: str
    resumed: dict
    hung: dict
    exit_code: int
    total: int


@pytest.fixture(scope="module")
def story(drill):
    often = {
        "levels__fold_every_tokens": INTERVAL,
        "checkpoint__every_tokens": INTERVAL,
        "checkpoint__may_change": "train.total_tokens,levels.schedule.total_tokens",
        "cluster__hang_timeout_s": 12,
        "cluster__resize_check_s": 3,
    }
    job = drill.train("story", ENDLESS, **often)
    job.wait_for_attempt(180, workers=3)
    committed = job.wait_until("a checkpoint", lambda: job.rows("checkpoint"), 60)[-1]
    # Half an interval on: what is lost is what was trained since the last commit.
    killed_at = job.wait_for_tokens(committed["saved_tokens"] + INTERVAL // 2, 60)
    killed_s = time.time()
    drill.nodes[0].kill()
    recovered = job.wait_for_attempt(150, workers=2)
    drill.cluster.add_node(1)
    added_s = time.time()
    grown = job.wait_for_attempt(180, workers=3)
    job.wait_for_tokens(grown["tokens"] + INTERVAL, 60)
    job.stop()
    job.wait(120)
    stopped, first_log = read_status(str(job.output)), job.log

    total = stopped["tokens"] // QUANTUM + 100
    job = drill.train("story", total, **often)
    resumed = job.wait_for_attempt(180, attempt=stopped["attempt"] + 1)
    job.wait_for_tokens(resumed["tokens"] + 4 * QUANTUM, 60)
    job.kill_rank(1, signal.SIGSTOP)
    hung = job.wait_for_attempt(150, attempt=resumed["attempt"] + 1)
    exit_code = job.wait(180)
    return Story(
        job, killed_s, killed_at, recovered, added_s, grown, stopped, first_log, resumed, hung, exit_code, total
    )


def test_a_lost_node_is_left_behind_within_a_minute(story):
    assert story.recovered["first_step_s"] - story.killed_s <= 60 * story.job.drill.slowness
    assert story.recovered["workers"] == 2


def test_at_most_one_checkpoint_interval_is_trained_again(story):
    assert 0 <= story.recovered["tokens_lost"] <= INTERVAL


def test_a_returned_node_is_taken_in_within_90_seconds_and_costs_no_token(story):
    assert story.grown["first_step_s"] - story.added_s <= 90 * story.job.drill.slowness
    assert story.grown["tokens_lost"] == 0
    assert story.grown["reason"] == "resized from 2 to 3 workers"


def test_job_stop_leads_to_a_checkpoint_of_the_last_token(story):
    assert story.stopped["state"] == "stopped"
    assert story.stopped["checkpoint"]["tokens"] == story.stopped["tokens"]
    assert f"stopped: checkpoint at {story.stopped['tokens']:,} tokens is committed" in story.first_log


def test_the_same_run_submitted_again_goes_on(story):
    assert story.resumed["tokens"] == story.stopped["tokens"]
    assert story.resumed["tokens_lost"] == 0
    assert story.resumed["reason"] == "submitted again"


def test_a_hung_rank_is_found_and_its_stacks_are_kept(story):
    assert story.hung["reason"].startswith("hang: rank 1 made no progress for ")
    assert "stopped" in story.hung["reason"]
    assert 0 <= story.hung["tokens_lost"] <= INTERVAL
    stacks = [path.read_text() for path in (story.job.output / "watchdog").glob("*-rank_0001.txt")]
    assert stacks
    assert "train_on_worker" in stacks[0]


def test_the_hang_speaks_against_the_node_of_the_rank_that_caused_it(story):
    strikes = read_events(open_store("s3://drill/runs"), "story", kinds=("strike",))
    assert strikes[-1]["text"] == "rank 1 hung"
    assert "left out" not in story.job.log


def test_the_run_ends_complete_each_quantum_once_and_every_tick_right(story):
    assert story.exit_code == 0
    rows = story.job.rows()
    steps = [row["step"] for row in effective(rows) if row["kind"] == "step"]
    assert steps == list(range(1, story.total + 1))
    for name, count in rows[-1]["level_updates"].items():
        assert count["done"] == count["due"] > 0, name
        assert count["skipped"] == 0, name
        ticks = [row["tokens"] for row in effective(rows) if row["kind"] == "tick" and row["level"] == name]
        assert len(ticks) == len(set(ticks)) == count["due"], name


def test_the_report_accounts_for_the_time(story):
    report = goodput(story.job.rows())
    assert report["accounted"] >= 0.95
    assert len(report["restarts"]) == 4
    assert report["restart_s"] > 0


def test_status_tells_of_it_from_the_folder_and_from_the_store(story):
    for url in (str(story.job.output), "s3://drill/runs/story"):
        status = read_status(url)
        assert status["state"] == "finished"
        assert status["tokens"] == story.total * QUANTUM
        assert [attempt["reason"][:4] for attempt in status["attempts"][1:]] == ["rank", "resi", "subm", "hang"]
        text = describe_status(status)
        assert "made no progress" in text
        assert "level slow" in text


def test_a_deterministic_bug_stops_the_second_time_with_its_traceback(drill, tmp_path):
    root = planted(tmp_path, "if quantum == 6:\n    raise ValueError('planted at step 7')")
    job = drill.train("bug", 40, root=root, cluster__max_workers=2)
    assert job.wait(240) != 0
    # A start while a node was slow to answer may grow before it fails; that is no failure.
    failed = [attempt for attempt in job.rows("attempt") if not attempt["reason"].startswith("resized")]
    assert len(failed) == 2
    assert "ValueError: planted at step 7" in job.log
    assert 'loop.py", line' in job.log
    reason = next(line for line in reversed(job.log.splitlines()) if line.startswith("error: "))
    assert "ValueError: planted at step 7 (loop.py:" in reason
    assert "the same failure 2 times in a row without progress" in reason
    status = read_status(str(job.output))
    assert (status["state"], status["alive"]) == ("failed", False)
    assert "ValueError: planted at step 7" in describe_status(status).splitlines()[0]


def test_a_node_on_which_ranks_die_at_each_start_is_left_out_and_the_run_ends_right(drill, tmp_path):
    bad = drill.cluster.add_node(1, BAD_NODE="1")
    nodes = 1 + sum(node.alive for node in drill.nodes)
    root = planted(tmp_path, DIE_ON_BAD_NODE)
    values = {"cluster__max_workers": nodes, "cluster__max_node_strikes": 2}
    job = drill.train("bad", 12, root=root, **values)
    try:
        assert job.wait(270) == 0, job.log[-3000:]
    finally:
        bad.stop()
    assert f"strike 1 of 2 against node {bad.name}" in job.log
    assert f"node {bad.name} is left out from now on: 2 strikes within 24 hours" in job.log
    attempts = job.rows("attempt")
    assert [attempt["workers"] for attempt in attempts][-1] == nodes - 1
    steps = [row["step"] for row in effective(job.rows()) if row["kind"] == "step"]
    assert steps == list(range(1, 13))
    # The next submission knows it, too.
    strikes = read_events(open_store("s3://drill/runs"), "bad", kinds=("strike",))
    assert [(event["node"], event["weight"]) for event in strikes] == [(bad.name, 1), (bad.name, 1)]
