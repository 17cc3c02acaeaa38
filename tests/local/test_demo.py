"""What the demo decides before it starts anything: its overrides, and what it refuses. The whole demo: integration."""

import dataclasses
from pathlib import Path

import pytest

from jobs.hope_tiny import config as tiny
from nltrain.config import override
from nltrain.errors import ConfigError
from nltrain.local.demo import Demo, DemoError, quick

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_the_quick_form_fits_whatever_numbers_the_job_has(seq_len):
    job = override(
        tiny,
        [
            f"data.seq_len={seq_len}",
            f"levels.quantum_tokens={8 * seq_len}",
            *(f"levels.levels.{name}.period_tokens={8 * seq_len * times}"
              for name, times in (("base", 1), ("fast", 1), ("mid", 4), ("slow", 16))),
            f"levels.fold_every_tokens={80 * seq_len}",
            f"checkpoint.every_tokens={80 * seq_len}",
        ],
    )  # fmt: skip
    short = override(job, quick(job))
    assert short.train.total_tokens <= 100_000
    assert [level.period_tokens // short.quantum_tokens for level in short.levels.levels] == [1, 1, 4, 16]
    # The kill comes at half of the tokens: by then there is something to resume from.
    assert short.checkpoint.every_tokens < short.train.total_tokens // 2
    assert dataclasses.replace(short.model) == job.model


def test_the_demo_says_at_once_what_cannot_be(tmp_path):
    with pytest.raises(DemoError, match=r"--corpus .*nothing: no such file or folder"):
        Demo(ROOT, tmp_path / "run", tmp_path / "nothing").run()
    (tmp_path / "run" / "text").mkdir(parents=True)
    with pytest.raises(DemoError, match=r"--corpus .*text: lies in the run's folder, which is renamed"):
        Demo(ROOT, tmp_path / "run", tmp_path / "run" / "text").run()
    with pytest.raises(ConfigError, match=r"train\.total_toks: no such field; did you mean total_tokens"):
        Demo(ROOT, tmp_path / "run", overrides=["train.total_toks=3"])
    assert (tmp_path / "run" / "text").exists()


def test_settings_of_preparing_reach_it_and_the_others_the_job():
    demo = Demo(ROOT, Path("/nowhere"), overrides=["prepare.max_bad_fraction=0.5", "train.seed=3"])
    assert demo._prepare == ["prepare.max_bad_fraction=0.5"]
    assert demo._overrides == ["train.seed=3"]
