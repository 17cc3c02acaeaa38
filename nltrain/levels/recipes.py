"""What else must change with the quantum, so that a run on more GPUs trains as the smaller one did."""

from dataclasses import replace

from nltrain.levels.config import LevelConfig, LevelsConfig, LevelsError


def larger_quantum(levels: LevelsConfig, factor: int) -> LevelsConfig:
    """`levels` with `factor` times the quantum, for `factor` times the ranks.

    Periods in tokens are kept, but for those below the new quantum, which become it. A level whose period grows r-fold
    sees r times the tokens per update: its lr grows by sqrt(r), the rule for AdamW, whose noise shrinks by that.
    Decay per token, lr x weight_decay / base period, is kept. Warm-up and schedule are in tokens and stay; betas stay.
    Up to which batch sqrt holds is known for each model by trial only; it is the published practice to about 4x.
    """
    if factor < 1:
        raise LevelsError(f"larger_quantum: factor = {factor}, must be >= 1")
    quantum = factor * levels.quantum
    base_period = max(levels.base_period_tokens, quantum)

    def grown(level: LevelConfig) -> LevelConfig:
        period = max(level.period_tokens, quantum)
        lr = level.lr * (period / level.period_tokens) ** 0.5
        decay = level.weight_decay * (level.lr / lr if lr else 1.0) * base_period / levels.base_period_tokens
        phase = level.phase_tokens if level.phase_tokens is None else level.phase_tokens // quantum * quantum
        return replace(level, period_tokens=period, lr=lr, weight_decay=decay, phase_tokens=phase)

    return replace(levels, levels=tuple(grown(level) for level in levels.levels), quantum_tokens=quantum)
