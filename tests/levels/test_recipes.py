"""A run with a larger quantum keeps what is counted in tokens."""

import pytest

from nltrain.levels.config import LevelConfig, LevelsConfig, LevelsError, ScheduleConfig
from nltrain.levels.recipes import larger_quantum


def test_a_larger_quantum_keeps_slow_periods_decay_per_token_and_schedule_and_raises_lr_by_the_root():
    schedule = ScheduleConfig("cosine", warmup_tokens=1000, total_tokens=9000)
    made = (
        LevelConfig("base", ("rest",), 100, lr=1e-3, weight_decay=0.1),
        LevelConfig("fast", ("f.*",), 200, lr=1e-3, weight_decay=0.1),
        LevelConfig("slow", ("s.*",), 1600, lr=1e-3, weight_decay=0.1),
    )
    before = LevelsConfig(made, quantum_tokens=100, schedule=schedule, reduce_dtype="bf16")
    after = larger_quantum(before, 4)
    assert after.quantum == 400 and after.schedule == schedule and after.reduce_dtype == "bf16"
    assert [level.period_tokens for level in after.levels] == [400, 400, 1600]
    assert [level.lr for level in after.levels] == pytest.approx([2e-3, 2**0.5 * 1e-3, 1e-3])
    for old, new in zip(before.levels, after.levels, strict=True):
        per_token = old.lr * old.weight_decay / before.base_period_tokens
        assert new.lr * new.weight_decay / after.base_period_tokens == pytest.approx(per_token)
    assert larger_quantum(before, 1) == before
    with pytest.raises(LevelsError, match="factor = 0"):
        larger_quantum(before, 0)
