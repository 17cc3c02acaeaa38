"""The way of a token, whole: real S3, real Ray cluster, real ranks, real SIGKILL."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nltrain.local.demo import kill_one_rank_half_way
from nltrain.track.metrics import effective, read_rows
from tests.integration.support import BUCKET, QUANTUM, World, world

QUIET = ("track.wandb=off",)  # each start of W&B takes seconds, and one run shows it


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One cluster and two users of it, at the same time; {name of the job: (exit code, what it printed)}."""
    with world(tmp_path_factory.mktemp("spine")) as here, ThreadPoolExecutor(2) as users:
        both = [users.submit(one_with_a_kill, here), users.submit(one_with_many_jobs, here)]
        outputs = both[0].result() | both[1].result()
        for name in ("undisturbed", "again", "killed"):
            code, text = outputs[name]
            assert code == 0, f"{name}:\n{text}"
        yield here, outputs


def one_with_a_kill(here: World) -> dict[str, tuple[int, str]]:
    """A run, and the same with one rank killed half way."""
    outputs = {"undisturbed": here.run("undisturbed")}
    with kill_one_rank_half_way(here.folder / "killed"):
        # Below a key that is no plain URI, which Ray has to reach as well.
        outputs["killed"] = here.run("killed", f"checkpoint.url=s3://{BUCKET}/runs #1?x=50%", *QUIET)
    return outputs


def one_with_many_jobs(here: World) -> dict[str, tuple[int, str]]:
    """The same run by the README's short form, submitted again when it has finished, then with another config; a bad
    place."""
    outputs = {"again": here.run("again", *QUIET, short=True)}
    outputs["resubmitted"] = here.run("again", *QUIET)
    outputs["changed"] = here.run("again", "levels.levels.slow.lr=0.001", "cluster.max_failures=0", *QUIET)
    outputs["nowhere"] = here.run("nowhere", "data.prefix=s3://no-such-bucket/corpus", "cluster.max_failures=0")
    outputs["relative"] = here.run("relative", "checkpoint.url=runs/ckpt")
    return outputs


def losses(here: World, name: str) -> list[tuple[int, float]]:
    rows = effective(read_rows(here.folder / name))
    return [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "step"]


def test_two_runs_of_one_config_give_the_same_losses(runs):
    here, _ = runs
    assert len(losses(here, "undisturbed")) == 60
    assert losses(here, "undisturbed") == losses(here, "again")


def test_a_killed_and_resumed_run_ends_with_the_same_weights_bit_for_bit(runs):
    here, _ = runs
    undisturbed, killed = here.summary("undisturbed"), here.summary("killed")
    assert killed["kills"] == killed["resumes"] == 1
    assert undisturbed["kills"] == undisturbed["resumes"] == 0
    assert killed["weights_sha256"] == undisturbed["weights_sha256"]
    assert losses(here, "killed") == losses(here, "undisturbed")
    assert killed["val_loss"] == undisturbed["val_loss"]


def test_the_resumed_run_says_where_it_went_on(runs):
    _, outputs = runs
    assert "resumed from checkpoint tokens_" in outputs["killed"][1]


@pytest.mark.parametrize("name", ["undisturbed", "killed"])
def test_every_level_updates_as_often_as_its_clock_says(runs, name):
    here, _ = runs
    updates = here.summary(name)["level_updates"]
    assert {level: count["due"] for level, count in updates.items()} == {"base": 60, "fast": 60, "mid": 15, "slow": 3}
    assert all(count["done"] == count["due"] and count["skipped"] == 0 for count in updates.values())


def test_the_summary_has_what_a_user_asks_for(runs):
    here, _ = runs
    summary = here.summary("undisturbed")
    expected = {
        "tokens", "seconds", "tokens_per_s", "loss_first", "loss_last", "val_loss", "unigram_entropy",
        "bigram_entropy", "level_updates", "kills", "resumes", "workers", "checkpoints",
    }  # fmt: skip
    assert expected <= set(summary)
    assert summary["tokens"] == 60 * QUANTUM
    assert summary["workers"] == 2
    assert summary["checkpoints"] == 6
    assert summary["loss_last"] < summary["loss_first"]
    assert (here.folder / "undisturbed" / "cadence.png").stat().st_size > 5_000
    assert list((here.folder / "undisturbed" / "wandb").glob("**/*.wandb"))


def test_resubmitting_a_finished_run_changes_nothing(runs):
    here, outputs = runs
    code, text = outputs["resubmitted"]
    assert code == 0, text
    assert "resumed from checkpoint" in text
    assert here.summary("again")["weights_sha256"] == here.summary("undisturbed")["weights_sha256"]


def test_a_run_of_another_config_is_not_resumed_under_the_same_name(runs):
    code, text = runs[1]["changed"]
    assert code != 0
    assert "levels.levels" in text and "0.001" in text
    assert "Traceback" not in text


def test_the_short_form_of_the_readme_works_from_the_repository_root(runs):
    here, outputs = runs
    assert "finished: " in outputs["again"][1]
    assert here.summary("again")["tokens"] == 60 * QUANTUM


def test_a_relative_place_of_a_submitted_job_is_refused_with_what_to_write(runs):
    code, text = runs[1]["relative"]
    assert code != 0
    assert "error: checkpoint.url='runs/ckpt': a relative path" in text
    assert "write checkpoint.url=$PWD/runs/ckpt" in text and "Traceback" not in text


def test_the_log_says_where_things_lie(runs):
    here, outputs = runs
    where = f"metrics in s3://nltrain-test/runs/again; metrics, plots and summary in {here.folder}/again"
    assert where in outputs["again"][1]


def test_bad_places_are_named_in_one_line(runs):
    code, text = runs[1]["nowhere"]
    assert code != 0
    assert "error:" in text and "s3://no-such-bucket" in text
