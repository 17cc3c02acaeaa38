"""Configs: every shipped one builds and survives a round trip; what cannot run is refused by name."""

import importlib
import json

import pytest

from nltrain.config import RunConfig, describe, flatten, from_dict, override, to_dict
from nltrain.errors import ConfigError

JOBS = ("jobs.hope_tiny", "jobs.hope_760m", "jobs.hope_1p3b", "jobs.hope_1p3b_256", "jobs.hope_1p3b_512")


def config_of(job: str) -> RunConfig:
    return importlib.import_module(job).config


@pytest.mark.parametrize("job", JOBS)
def test_a_shipped_config_survives_json(job):
    config = config_of(job)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("job", JOBS)
def test_every_field_of_a_shipped_config_can_be_overridden_by_its_own_value(job):
    config = config_of(job)
    assignments = []
    for name, value in flatten(to_dict(config)).items():
        if isinstance(value, list):
            value = json.dumps(value)
        assignments.append(f"{name}={value}")
    assert override(config, assignments) == config


def test_compiled_blocks_and_zero_3_exclude_each_other():
    config = config_of("jobs.hope_tiny")
    blocks = ["model.compile=blocks", *(f"levels.levels.{level.name}.zero_stage=1" for level in config.levels.levels)]
    assert override(config, blocks).model.compile == "blocks"
    with pytest.raises(ConfigError, match=r"model\.compile='blocks': level slow is at zero_stage=3"):
        override(config, [*blocks, "levels.levels.slow.zero_stage=3"])
    assert override(config, [*blocks[1:], "model.compile=steps", "levels.levels.slow.zero_stage=3"])


def test_numbers_tuples_and_names_are_read_as_a_person_writes_them():
    config = override(
        config_of("jobs.hope_tiny"),
        [
            "train.total_tokens=1e6",
            "levels.schedule.total_tokens=1e6",
            "levels.levels.slow.lr=1e-4",
            "levels.levels.slow.betas=0.8,0.9",
            "train.seed=7",
        ],
    )
    assert config.train.total_tokens == 1_000_000
    assert config.levels.levels[3].lr == 1e-4
    assert config.levels.levels[3].betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["train.total_token=5"], ("train.total_token", "did you mean total_tokens")),
        (["levels.levels.slwo.lr=1"], ("slwo", "slow")),
        (["train.total_tokens=many"], ("train.total_tokens", "many", "int")),
        (["train.total_tokens"], ("path.to.field=value",)),
        (["track.wandb=maybe"], ("track.wandb", "maybe", "offline")),
        (["output=runs/x"], ("output", "runs/x", "absolute")),
        (["levels.levels.slow.period_tokens=1000", "levels.quantum_tokens=2048"], ("slow", "1000", "2048")),
        (["levels.levels.slow.zero_stage=0"], ("zero_stage", "0", "choose 1, 2 or 3")),
        (["cluster.max_workers=64"], ("4 sequences", "64")),
        (["train.total_tokens=100"], ("train.total_tokens=100", "4096")),
        (["checkpoint.every_tokens=6000", "levels.fold_every_tokens=6000"], ("checkpoint.every_tokens=6000", "4096")),
        (["levels.fold_every_tokens=12288"], ("levels.fold_every_tokens=12288", "checkpoint.every_tokens")),
        (["levels.fold_every_tokens=none"], ("levels.fold_every_tokens=None", "checkpoint.every_tokens")),
        (["train.total_tokens=1e6"], ("levels.schedule.total_tokens=1843200", "train.total_tokens=1000000")),
        (["data.seq_len=300"], ("4096", "300")),
        (["model.width=100"], ("head_dim", "100")),
    ],
)
def test_a_config_that_cannot_run_is_refused_with_field_value_and_remedy(assignments, words):
    with pytest.raises(ValueError) as error:
        override(config_of("jobs.hope_tiny"), assignments)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_field_of_a_stored_config_is_named():
    values = to_dict(config_of("jobs.hope_tiny"))
    values["train"]["sede"] = 1
    with pytest.raises(ConfigError, match=r"train\.sede.*seed"):
        from_dict(RunConfig, values)


def test_the_resolved_config_lists_every_field():
    text = describe(config_of("jobs.hope_tiny"))
    for name in ("levels.levels.slow.period_tokens = 65536", "train.seed = 0", 'model.family = "hope"'):
        assert name in text


def test_the_fold_may_be_finer_than_the_saves_and_saves_may_be_by_the_clock_alone():
    fine = override(config_of("jobs.hope_tiny"), ["levels.fold_every_tokens=4096", "checkpoint.every_minutes=15"])
    assert fine.checkpoint.every_tokens % fine.levels.fold_every_tokens == 0
    override(fine, ["checkpoint.every_tokens=0"])


@pytest.mark.parametrize("job", [job for job in JOBS if job != "jobs.hope_tiny"])
def test_the_papers_runs_save_every_quarter_of_an_hour_at_the_slowest_rate_that_was_counted(job: str) -> None:
    config = config_of(job)
    assert config.checkpoint.every_minutes == 15
    tokens_per_s = 900 * config.cluster.max_workers  # a save by the clock waits for the next fold
    assert config.levels.fold_every_tokens / tokens_per_s < 15 * 60
