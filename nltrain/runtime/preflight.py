"""Checks before a run asks for its workers: its places, its data, its checkpoints. Each error is one line.

A path that a user writes means a place on the user's machine. Where the command runs there, the path is made absolute.
A submitted job runs in another folder, so there a relative path is refused with what to write instead.
"""

from collections.abc import Sequence
from dataclasses import replace

from nltrain.checkpoint.catalog import list_checkpoints, split_resume_url
from nltrain.checkpoint.errors import CheckpointError
from nltrain.checkpoint.manifest import check_run
from nltrain.config import RunConfig, check_vocabulary
from nltrain.data import DataError, open_order
from nltrain.errors import ConfigError
from nltrain.store import open_store
from nltrain.store.places import absolute_place, as_uri, join_url, parse_place
from nltrain.store.probe import check_atomic_create

FOLDERS = ("output", "data.cache_dir", "track.wandb_dir")
"""Fields that name a folder on a machine of the run, never a URL."""
PLACES = (*FOLDERS, "checkpoint.url", "checkpoint.resume", "data.prefix")
"""Every field that names a place."""


def settle_assignments(assignments: Sequence[str]) -> list[str]:
    """The overrides of a command line with every place in them absolute. Raises PlaceError, ConfigError."""
    settled = []
    for assignment in assignments:
        field, separator, value = assignment.partition("=")
        settled.append(f"{field}={settle(field, value)}" if separator and field in PLACES else assignment)
    return settled


def settle_config(config: RunConfig) -> RunConfig:
    """`config` with every place absolute, also the places in the job's file. Raises PlaceError, ConfigError."""
    checkpoint, data, track = config.checkpoint, config.data, config.track
    return replace(
        config,
        output=settle("output", config.output),
        checkpoint=replace(
            checkpoint,
            url=settle("checkpoint.url", checkpoint.url),
            resume=settle("checkpoint.resume", checkpoint.resume),
        ),
        data=replace(
            data,
            prefix=settle("data.prefix", data.prefix),
            cache_dir=settle("data.cache_dir", data.cache_dir),
        ),
        track=replace(track, wandb_dir=track.wandb_dir and settle("track.wandb_dir", track.wandb_dir)),
    )


def settle(field: str, value: str) -> str:
    """The value of one field of PLACES, absolute."""
    if field == "checkpoint.resume":
        if value in ("", "auto", "never"):
            return value
        url, at, tokens = value.rpartition("@")
        return f"{absolute_place(field, url)}@{tokens}" if at and tokens.isdigit() else absolute_place(field, value)
    if field == "data.prefix":
        return ",".join(absolute_place(field, part.strip()) for part in value.split(",") if part.strip())
    if field == "track.wandb_dir" and value.lower() in ("none", "null"):
        return value
    if field in FOLDERS and value and not isinstance(parse_place(value), str):
        raise ConfigError(f"{field}={value!r}: must be a folder of the machine that writes it, not a URL")
    return absolute_place(field, value)


def describe_places(config: RunConfig) -> str:
    """Where everything comes from and goes to, for the log."""
    checkpoints = join_url(config.checkpoint.url, config.name)
    return (
        f"places: data from {config.data.prefix}; checkpoints, status and copies of the metrics in {checkpoints}; "
        f"metrics, plots and summary in {config.output} on the machine of rank 0"
    )


def check_shared(config: RunConfig, num_nodes: int) -> str:
    """A warning where several nodes need one shared folder and may not have it; otherwise empty."""
    local = [
        f"{field}={value}"
        for field, values in (("checkpoint.url", (config.checkpoint.url,)), ("data.prefix", config.data.prefixes))
        for value in values
        if isinstance(parse_place(value), str)
    ]
    if num_nodes < 2 or not local:
        return ""
    return f"warning: {', '.join(local)}: a folder that all {num_nodes} nodes must share; on local disks the run fails"


def check_run_can_start(config: RunConfig) -> None:
    """Check that data and checkpoints can be reached and hold what the run will need, also hours later.

    Raises ConfigError, PlaceError, DataError, StoreError or CheckpointError.
    """
    check_run(config.name)
    as_uri(join_url(config.checkpoint.url, config.name))  # Ray keeps its own notes there
    check_vocabulary(config, open_order(config.data).vocab_size)
    check_atomic_create(open_store(config.checkpoint.url), f"{config.name}/attempts")
    _check_validation(config)
    _check_resume(config)


def _check_validation(config: RunConfig) -> None:
    wanted = config.train.validation_sequences
    if not wanted:
        return
    try:
        plan = open_order(replace(config.data, split="validation", weights=()))
        targets = sum(dataset.num_targets for dataset in plan.datasets)
        why = "" if targets else f"{config.data.prefix}: split 'validation' holds no target"
    except DataError as error:
        why = str(error)
    if why:
        raise ConfigError(
            f"train.validation_sequences={wanted}: {why}; or set train.validation_sequences=0 to train without"
        )


def _check_resume(config: RunConfig) -> None:
    """The store answers, and the checkpoint that checkpoint.resume names exists."""
    by_hand = config.checkpoint.resume
    own = list_checkpoints(open_store(config.checkpoint.url), config.name)
    if by_hand in ("auto", "never") or any(info.complete for info in own):
        return  # checkpoint.resume counts only once: a run that has saved goes on from its own checkpoint
    store, run, tokens = split_resume_url(by_hand)
    if not any(info.complete and tokens in (None, info.tokens) for info in list_checkpoints(store, run)):
        raise CheckpointError(
            f"checkpoint.resume={by_hand!r}: no such checkpoint; see `nltrain list {join_url(store.url, run)}`"
        )
