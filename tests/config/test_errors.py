"""One form for every refused setting; one base for what a user can mend."""

from collections.abc import Callable

import pytest

from nltrain.checkpoint.config import CheckpointConfig
from nltrain.config import TrainConfig
from nltrain.data.config import DataConfig
from nltrain.errors import ConfigError, UserError, require
from nltrain.levels.config import LevelConfig, LevelsConfig, ScheduleConfig
from nltrain.model import ModelConfig
from nltrain.runtime.config import ClusterConfig
from nltrain.track.config import TrackConfig


def test_a_condition_that_holds_passes_and_one_that_does_not_names_field_value_and_remedy() -> None:
    require(True, "a.b", 1, "must be 2")
    with pytest.raises(ConfigError, match=r"^a\.b='x': must be 2$"):
        require(False, "a.b", "x", "must be 2")
    assert issubclass(ConfigError, UserError) and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CheckpointConfig(url="x", keep_last=0), "checkpoint.keep_last=0: must be at least 1"),
        (lambda: DataConfig(seq_len=0), "data.seq_len=0: must be at least 1"),
        (lambda: LevelConfig("slow", ("a",), 0), "levels.levels.slow.period_tokens=0: must be at least 1"),
        (lambda: LevelsConfig((LevelConfig("a", ("a",), 8),), max_lr=0), "levels.max_lr=0: must be positive or none"),
        (lambda: ScheduleConfig(warmup_tokens=-1), "levels.schedule.warmup_tokens=-1: must be at least 0"),
        (lambda: ModelConfig(level_mlp="gelu"), "model.level_mlp='gelu': choose swiglu or silu"),
        (lambda: TrackConfig(log_every_quanta=0), "track.log_every_quanta=0: must be at least 1"),
        (lambda: ClusterConfig(max_workers=0), "cluster.max_workers=0: must be at least 1"),
        (lambda: TrainConfig(validation_sequences=-1), "train.validation_sequences=-1: must not be negative"),
    ],
)
def test_every_room_refuses_a_setting_in_the_same_form(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message
