"""What is told before a run asks for workers: places, and what it will need in hours."""

from dataclasses import replace

import pytest

from jobs.hope_tiny import config as tiny
from nltrain.checkpoint.errors import CheckpointError
from nltrain.config import override, to_dict
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare
from nltrain.data.prepare.corpus import Document
from nltrain.errors import ConfigError
from nltrain.runtime.preflight import (
    PLACES,
    check_run_can_start,
    check_shared,
    settle,
    settle_assignments,
    settle_config,
)
from nltrain.settings import flatten
from nltrain.store import open_store
from nltrain.store.places import PlaceError

TEXTS = [Document(f"{n}", f"line {n} of some text, and more of it " * 20) for n in range(12)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets with and without something held out; {fraction: folder}."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer([text for _, text in TEXTS], vocab_size=300)
    for fraction in (0.0, 0.4):
        settings = PrepareConfig(seq_len=32, validation_fraction=fraction)
        prepare(TEXTS, open_store(str(folder / str(fraction))), tokenizer, settings)
    return folder


def run(tmp_path, prefix, *assignments):
    base = ["data.seq_len=32", f"checkpoint.url={tmp_path}", f"data.prefix={prefix}", "model.vocab_size=300"]
    return override(tiny, [*base, *assignments])


def test_every_field_that_names_a_place_is_known():
    words = ("url", "prefix", "dir", "output", "path", "folder", "resume", "file")
    named = {
        name for name in flatten(to_dict(tiny)) if any(word == name.split(".")[-1].split("_")[-1] for word in words)
    }
    assert named == set(PLACES)


@pytest.mark.parametrize("field", PLACES)
def test_a_relative_place_is_made_absolute_here_and_refused_in_a_submitted_job(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settle_assignments([f"{field}=a/b", "train.seed=1"]) == [f"{field}={tmp_path}/a/b", "train.seed=1"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(PlaceError, match=rf"^{field}='a/b': a relative path.*write {field}=\$PWD/a/b"):
        settle_assignments([f"{field}=a/b"])


def test_each_part_of_a_place_keeps_its_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settle("data.prefix", "a, s3://b/c?d ,/e") == f"{tmp_path}/a,s3://b/c?d,/e"
    assert settle("checkpoint.resume", "runs/x@500") == f"{tmp_path}/runs/x@500"
    assert settle("checkpoint.resume", "never") == "never"
    assert settle("track.wandb_dir", "none") == "none"
    for field in ("output", "data.cache_dir", "track.wandb_dir"):
        with pytest.raises(ConfigError, match=rf"{field}='s3://b/x': must be a folder"):
            settle(field, "s3://b/x")
    config = settle_config(
        replace(tiny, checkpoint=replace(tiny.checkpoint, url="c"), data=replace(tiny.data, prefix="d"))
    )
    assert (config.checkpoint.url, config.data.prefix) == (f"{tmp_path}/c", f"{tmp_path}/d")


def test_a_run_with_all_it_needs_is_let_through(data, tmp_path):
    check_run_can_start(run(tmp_path, data / "0.4"))
    check_run_can_start(run(tmp_path, data / "0.0", "train.validation_sequences=0"))


def test_an_empty_validation_split_is_refused_before_the_run(data, tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.validation_sequences=24: .*'validation' holds no.*=0 to train without"
    ):
        check_run_can_start(run(tmp_path, data / "0.0"))


def test_one_of_several_datasets_without_a_validation_split_is_refused_too(data, tmp_path):
    with pytest.raises(ConfigError, match=rf"{data}/0\.0.*validation"):
        check_run_can_start(run(tmp_path, f"{data}/0.4,{data}/0.0"))


def test_a_checkpoint_picked_by_hand_that_is_not_there_is_refused_before_the_run(data, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.resume='.*/other@500': no such checkpoint; see `nltrain list"
    ):
        check_run_can_start(run(tmp_path, data / "0.4", f"checkpoint.resume={tmp_path}/other@500"))


def test_a_name_that_is_no_folder_is_refused_before_the_run(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"run='a b' is no name for a folder"):
        check_run_can_start(run(tmp_path, data / "0.4", "name=a b"))


def test_a_folder_that_several_nodes_would_each_have_is_warned_of(tmp_path):
    config = run(tmp_path, "s3://b/c")
    assert check_shared(config, 1) == ""
    assert f"checkpoint.url={tmp_path}" in check_shared(config, 2)
