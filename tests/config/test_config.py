"""Configs: every shipped one builds and survives a round trip; what cannot run is refused by name."""

import importlib
import json

import pytest

from nltrain.checkpoint.compare import check_config
from nltrain.checkpoint.errors import ConfigChangedError
from nltrain.config import DERIVED, RunConfig, describe, from_dict, may_change_on_resume, override, to_dict
from nltrain.errors import ConfigError
from nltrain.settings import flatten

JOBS = ("jobs.hope_tiny", "jobs.hope_760m", "jobs.hope_1p3b", "jobs.hope_1p3b_256", "jobs.hope_1p3b_512")


# What may differ on resume, as a list; the product states it at each field.
MAY_CHANGE = {
    "name",
    "output",
    "track",
    "cluster",
    "checkpoint",
    "model.recompute",
    "model.kernel",
    "model.attention",
    "model.compile",
    "model.compile_backend",
    "model.logits_bytes",
    "train.micro_batch_size",
    "train.validate_every_tokens",
    "train.validation_sequences",
    "train.sample_tokens",
    "train.reference_max_tokens",
    "data.prefix",
    "data.cache_dir",
    "data.cache_bytes",
    "data.buffer_bytes",
    "data.prefetch_batches",
    "data.download_threads",
    "data.range_read_batches",
    "data.attempts",
    "data.timeout_s",
    "levels.levels.*.zero_stage",
    "levels.levels.*.offload",
    "levels.bucket_elements",
    "levels.prefetch_elements",
    "levels.schedule.extension",
    "levels.schedule.extends_tokens",
}
OF_THE_DATA = {"data.seed", "data.weights", "data.window_shards", "data.split"}


def config_of(job: str) -> RunConfig:
    """The config that a job file defines."""
    return importlib.import_module(job).config


def resumed(stored: RunConfig, *assignments: str) -> list[str]:
    """The fields that change, all allowed, where a run with the config `stored` goes on with `assignments`."""
    present = override(stored, assignments)
    before, now = to_dict(stored.resolved()), to_dict(present.resolved())
    patterns = (*may_change_on_resume(present), *present.checkpoint.may_change)
    return [difference.field for difference in check_config(before, now, patterns, DERIVED)]


@pytest.mark.parametrize("job", JOBS)
def test_a_shipped_config_survives_json(job: str) -> None:
    config = config_of(job)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("job", JOBS)
def test_every_field_of_a_shipped_config_can_be_overridden_by_its_own_value(job: str) -> None:
    config = config_of(job)
    assignments = []
    for name, value in flatten(to_dict(config)).items():
        if isinstance(value, list):
            value = json.dumps(value)
        assignments.append(f"{name}={value}")
    assert override(config, assignments) == config


def test_compiled_blocks_and_zero_3_exclude_each_other() -> None:
    config = config_of("jobs.hope_tiny")
    blocks = ["model.compile=blocks", *(f"levels.levels.{level.name}.zero_stage=1" for level in config.levels.levels)]
    assert override(config, blocks).model.compile == "blocks"
    with pytest.raises(ConfigError, match=r"model\.compile='blocks': level slow is at zero_stage=3"):
        override(config, [*blocks, "levels.levels.slow.zero_stage=3"])
    assert override(config, [*blocks[1:], "model.compile=steps", "levels.levels.slow.zero_stage=3"])


def test_numbers_tuples_and_names_are_read_as_a_person_writes_them() -> None:
    config = override(
        config_of("jobs.hope_tiny"),
        [
            "train.total_tokens=1e6",
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
        (["checkpoint.every_tokens=6000"], ("checkpoint.every_tokens=6000", "4096")),
        (
            ["train.total_tokens=1e6", "levels.schedule.total_tokens=1843200"],
            ("levels.schedule.total_tokens=1843200", "train.total_tokens=1000000", "leave it at none"),
        ),
        (["train.total_tokens=81920"], ("levels.schedule.total_tokens=81920", "warmup_tokens = 81920")),
        (["data.seq_len=300"], ("4096", "300")),
        (["model.width=100"], ("head_dim", "100")),
    ],
)
def test_a_config_that_cannot_run_is_refused_with_field_value_and_remedy(
    assignments: list[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        override(config_of("jobs.hope_tiny"), assignments)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_field_of_a_stored_config_is_named() -> None:
    values = to_dict(config_of("jobs.hope_tiny"))
    values["train"]["sede"] = 1
    with pytest.raises(ConfigError, match=r"train\.sede.*seed"):
        from_dict(RunConfig, values)


def test_the_resolved_config_lists_every_field() -> None:
    text = describe(config_of("jobs.hope_tiny").resolved())
    for name in ("levels.levels.slow.period_tokens = 65536", "train.seed = 0", "levels.fold_every_tokens = 204800"):
        assert name in text


def test_the_fold_may_be_finer_than_the_saves_and_saves_may_be_by_the_clock_alone() -> None:
    fine = override(config_of("jobs.hope_tiny"), ["levels.fold_every_tokens=4096", "checkpoint.every_minutes=15"])
    assert fine.checkpoint.every_tokens % fine.levels.fold_every_tokens == 0
    override(fine, ["checkpoint.every_tokens=0"])


@pytest.mark.parametrize("job", [job for job in JOBS if job != "jobs.hope_tiny"])
def test_the_papers_runs_save_every_quarter_of_an_hour_at_the_slowest_rate_that_was_counted(job: str) -> None:
    config = config_of(job)
    assert config.checkpoint.every_minutes == 15
    tokens_per_s = 900 * config.cluster.max_workers  # a save by the clock waits for the next fold
    assert config.levels.fold_every_tokens / tokens_per_s < 15 * 60


def test_what_may_change_on_resume_is_said_at_the_fields_and_is_this() -> None:
    tiny = config_of("jobs.hope_tiny")
    assert set(may_change_on_resume(tiny)) == MAY_CHANGE
    other_data = override(tiny, ["checkpoint.other_data=true"])
    assert set(may_change_on_resume(other_data)) == MAY_CHANGE | OF_THE_DATA


def test_the_fold_and_the_end_of_the_schedule_follow_saves_and_total_tokens() -> None:
    tiny = config_of("jobs.hope_tiny")
    assert tiny.levels.fold_every_tokens is None and tiny.levels.schedule.total_tokens is None
    other = override(tiny, ["train.total_tokens=1e6", "checkpoint.every_tokens=40960"]).resolved()
    assert (other.levels.schedule.total_tokens, other.levels.fold_every_tokens) == (1_000_000, 40_960)
    assert other.resolved() == other
    given = override(tiny, ["levels.fold_every_tokens=4096", "levels.schedule.total_tokens=1843200"]).resolved()
    assert (given.levels.schedule.total_tokens, given.levels.fold_every_tokens) == (1_843_200, 4096)
    off = override(tiny, ["checkpoint.every_tokens=0", "levels.schedule.kind=constant"]).resolved()
    assert (off.levels.schedule.total_tokens, off.levels.fold_every_tokens) == (0, None)


def test_a_shipped_run_resolves_to_the_numbers_that_its_job_stated_before() -> None:
    tiny = config_of("jobs.hope_tiny").resolved().levels
    assert (tiny.fold_every_tokens, tiny.schedule.total_tokens) == (204_800, 1_843_200)
    large = config_of("jobs.hope_1p3b").resolved().levels
    assert (large.fold_every_tokens, large.schedule.total_tokens) == (16_777_216, 100_000_000_000)


@pytest.mark.parametrize("fold", ["none", "102400"])
def test_saves_may_come_more_often_after_a_resume_and_the_fold_with_them(fold: str) -> None:
    changed = resumed(config_of("jobs.hope_tiny"), "checkpoint.every_tokens=102400", f"levels.fold_every_tokens={fold}")
    assert changed == ["checkpoint.every_tokens", "levels.fold_every_tokens"]


def test_a_fold_that_changes_alone_is_refused_on_resume() -> None:
    tiny = config_of("jobs.hope_tiny")
    with pytest.raises(ConfigChangedError, match=r"levels.fold_every_tokens: stored 204800, now 4096"):
        resumed(tiny, "levels.fold_every_tokens=4096")
    with pytest.raises(ConfigChangedError, match=r"levels.fold_every_tokens: stored 204800, now 4096"):
        resumed(tiny, "levels.fold_every_tokens=4096", "checkpoint.every_tokens=102400")


def test_a_longer_run_is_allowed_by_naming_train_total_tokens_alone() -> None:
    tiny = config_of("jobs.hope_tiny")
    longer = "train.total_tokens=3686400"
    with pytest.raises(ConfigChangedError, match=r"levels.schedule.total_tokens: .*; train.total_tokens: "):
        resumed(tiny, longer)
    changed = resumed(tiny, longer, "checkpoint.may_change=train.total_tokens")
    assert changed == ["checkpoint.may_change", "levels.schedule.total_tokens", "train.total_tokens"]


def test_a_config_stored_by_an_earlier_release_states_both_values_and_resumes() -> None:
    stated = ("levels.fold_every_tokens=204800", "levels.schedule.total_tokens=1843200")
    tiny = config_of("jobs.hope_tiny")
    stored, present = to_dict(override(tiny, stated)), to_dict(tiny.resolved())
    assert stored == present
    constant = override(tiny, [*stated, "levels.schedule.kind=constant"])
    assert resumed(constant, "levels.schedule.total_tokens=none") == ["levels.schedule.total_tokens"]
