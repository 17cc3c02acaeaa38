"""The paper's language models as runs: Hope at 760M on 30B tokens and at 1.3B on 100B, in numbers that a job states."""

from nltrain.checkpoint.config import CheckpointConfig
from nltrain.config import RunConfig, TrainConfig
from nltrain.data.config import DataConfig
from nltrain.levels.config import LevelConfig, LevelsConfig, ScheduleConfig
from nltrain.model import as_trained
from nltrain.runtime.config import ClusterConfig

QUANTUM = 2**19  # tokens: 128 sequences of 4,096
PERIODS = {"base": QUANTUM, "fast": 2 * QUANTUM, "mid": 8 * QUANTUM, "slow": 32 * QUANTUM}
SAVE_EVERY_TOKENS = 1024 * QUANTUM
# A save by the clock waits for the next fold: at 64 GPUs and 100,000 tokens/s this one comes within 3 minutes.
FOLD_EVERY_TOKENS, SAVE_EVERY_MINUTES = PERIODS["slow"], 15.0


def paper_run(
    name: str, size: str, total_tokens: int, warmup_tokens: int, lr: float, workers: int, micro_batch_size: int
) -> RunConfig:
    """Base period 0.5M tokens; the continuum memory's levels update every 1M, 4M and 16M tokens; bf16 on GPUs.

    The run goes on with half of `workers` when nodes are lost.
    """
    model = as_trained("hope", size)
    patterns = model.level_patterns()
    levels = tuple(
        LevelConfig(
            level,
            patterns.get(level, ("rest",)),
            period_tokens,
            lr=lr,
            weight_decay=0.1,
            zero_stage=2 if level == "base" else 1,
        )
        for level, period_tokens in PERIODS.items()
    )
    return RunConfig(
        name=name,
        output=f"/mnt/nltrain/runs/{name}",
        model=model,
        data=DataConfig(prefix="s3://my-bucket/fineweb-edu/shards", seq_len=4096),
        levels=LevelsConfig(
            levels=levels,
            quantum_tokens=QUANTUM,
            schedule=ScheduleConfig("cosine", warmup_tokens=warmup_tokens, min_lr_fraction=0.1),
            dtype="bf16",
            reduce_dtype="bf16",
            fold_every_tokens=FOLD_EVERY_TOKENS,
        ),
        checkpoint=CheckpointConfig(
            url="s3://my-bucket/runs",
            every_tokens=SAVE_EVERY_TOKENS,
            every_minutes=SAVE_EVERY_MINUTES,
            keep_last=3,
            keep_every_tokens=10_000_000_000,
        ),
        train=TrainConfig(
            total_tokens=total_tokens,
            micro_batch_size=micro_batch_size,
            validate_every_tokens=SAVE_EVERY_TOKENS,
            validation_sequences=256,
        ),
        cluster=ClusterConfig(
            max_workers=workers,
            min_workers=workers // 2,
            device="cuda",
            cpus_per_worker=8.0,
            threads_per_worker=4,
            matmul_precision="high",
            allocator="expandable_segments:True",
        ),
    )
