"""A configuration that cannot run is refused with field and value; schedules follow tokens; imports stay light."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nltrain.levels.config import LevelConfig, LevelsConfig, LevelsError, ScheduleConfig


def level(
    name: str = "base", parameters: str | tuple[str, ...] = ("rest",), period_tokens: int = 64, **settings: Any
) -> LevelConfig:
    return LevelConfig(name, parameters, period_tokens, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: level(zero_stage=0), r"zero_stage=0: choose 1, 2 or 3"),
        (lambda: level(zero_stage=4), r"zero_stage=4"),
        (lambda: level(optimizer="lion"), r"optimizer='lion': choose one of adamw, sgd"),
        (lambda: level(phase_tokens=64), r"phase_tokens=64: must be none or lie in \[0, period_tokens=64\)"),
        (lambda: level(period_tokens=0), r"period_tokens=0"),
        (lambda: level(lr=-1), r"lr=-1"),
        (lambda: level(lr=float("nan")), r"lr=nan"),
        (lambda: level(clip_norm=0), r"clip_norm=0: must be positive, or none"),
        (lambda: level(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: level(max_relative_change=-0.1), r"max_relative_change=-0.1"),
        (lambda: level(lr=1.0, weight_decay=1.0), r"weight_decay=1.0"),
        (lambda: level(offload=True, optimizer="sgd"), r"offload=True: sgd without momentum"),
        (lambda: level(parameters=("rest", "a.*")), r'"rest" must stand alone'),
        (lambda: level(parameters=()), r"parameters=\(\)"),
        (lambda: level(name=""), r"name=''"),
        (lambda: LevelsConfig(()), r"levels=\[\]: is empty"),
        (lambda: LevelsConfig((level(), level(parameters=("a.*",)))), r"two levels of one name: base"),
        (lambda: LevelsConfig((level(), level("slow"))), r"base, slow all take"),
        (
            lambda: LevelsConfig((level(), level("fast", ("a.*",), 32)), quantum_tokens=64),
            r"levels.fast.period_tokens=32: is below the quantum of 64",
        ),
        (lambda: LevelsConfig((level(),), dtype="fp16"), r"dtype='fp16'"),
        (lambda: LevelsConfig((level(),), fold_every_tokens=8), r"fold_every_tokens=8: .* the quantum of 64"),
        (lambda: LevelsConfig((level(),), max_consecutive_skips=0), r"max_consecutive_skips=0"),
        (
            lambda: LevelsConfig((level(),)).check_sequences(24, 1),
            r"64: is not a whole number .* 24 tokens; use 48 or 72",
        ),
        (lambda: LevelsConfig((level(),)).check_sequences(16, 5), r"4 sequences of 16 tokens, fewer than 5 ranks"),
        (lambda: ScheduleConfig("cosine", total_tokens=0), r"total_tokens=0: cosine needs more than warmup_tokens = 0"),
        (lambda: ScheduleConfig("cosine").factor(0), r"levels.schedule.total_tokens=None: cosine needs it"),
        (lambda: ScheduleConfig("square"), r"kind='square'"),
        (lambda: ScheduleConfig(min_lr_fraction=2), r"min_lr_fraction=2"),
    ],
)
def test_a_bad_configuration_is_refused_with_name_and_number(make: Callable[[], object], message: str) -> None:
    with pytest.raises(LevelsError, match=message):
        make()


def test_schedules_are_functions_of_tokens() -> None:
    warm = ScheduleConfig("constant", warmup_tokens=100)
    assert [warm.factor(t) for t in (0, 50, 100, 10_000)] == [0, 0.5, 1, 1]
    cosine = ScheduleConfig("cosine", warmup_tokens=100, total_tokens=1100, min_lr_fraction=0.1)
    assert cosine.factor(100) == 1 and cosine.factor(600) == pytest.approx(0.55)
    assert cosine.factor(1100) == pytest.approx(0.1) == cosine.factor(5000)
    linear = ScheduleConfig("linear", total_tokens=1000)
    assert linear.factor(250) == pytest.approx(0.75)
    wsd = ScheduleConfig("wsd", warmup_tokens=100, total_tokens=1000, decay_fraction=0.5)
    assert [wsd.factor(t) for t in (100, 500, 1000)] == [1, 1, 0] and wsd.factor(750) == pytest.approx(0.5)


def test_lr_and_betas_scale_with_the_period_as_configured() -> None:
    made = LevelsConfig(
        (level(lr=1e-3), level("slow", ("a.*",), 64 * 16, lr=1e-3)),
        lr_period_exponent=0.5,
        beta_period_exponent=1.0,
        max_lr=3e-3,
    ).resolved()
    assert [c.lr for c in made] == [1e-3, 3e-3]
    assert made[1].betas == (0.9**16, 0.95**16) and made[0].betas == (0.9, 0.95)


def test_configs_clock_and_quantum_import_neither_deepspeed_nor_torch() -> None:
    code = "import sys, nltrain.levels.config, nltrain.levels.clock, nltrain.levels.quantum; "
    code += "print([m for m in ('deepspeed', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
