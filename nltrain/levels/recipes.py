"""Changes to make together with the quantum, so that a run on more GPUs trains as the smaller one did."""

from dataclasses import replace

from nltrain.levels.config import LevelConfig, LevelsConfig, LevelsError


def larger_quantum(levels: LevelsConfig, factor: int) -> LevelsConfig:
    """`levels` with `factor` times the quantum, for `factor` times the ranks.

    Periods below the new quantum become the new quantum; the others are kept. A level whose period grows r-fold sees r
    times the tokens per update, so its lr grows by sqrt(r), the rule for AdamW. Decay per token, lr x weight_decay /
    base period, is kept. Warm-up and schedule are in tokens and stay; betas stay. The batch up to which the sqrt rule
    holds must be found by trial for each model; published practice uses it up to about 4x.
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
