#!/usr/bin/env python
"""Hope at 760 million parameters on 30 billion tokens, the smaller of the sizes that the paper reports.

    ray job submit --working-dir . -- python jobs/hope_760m.py data.prefix=s3://B/shards checkpoint.url=s3://B/runs
    python jobs/hope_760m.py --dry-run      # prints the config and the plan, needs no GPU

Base period 0.5M tokens; the continuum memory's levels update every 1M, 4M and 16M tokens.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nltrain.checkpoint.config import CheckpointConfig
from nltrain.config import RunConfig, TrainConfig
from nltrain.data.config import DataConfig
from nltrain.levels.config import LevelConfig, LevelsConfig, ScheduleConfig
from nltrain.model import preset
from nltrain.runtime.config import ClusterConfig
from nltrain.runtime.launch import main

QUANTUM = 2**19  # tokens: 128 sequences of 4,096
TOTAL_TOKENS = 30_000_000_000

# Without recomputing, the chunk loop would keep 100 GiB of activations per sequence.
model = replace(preset("hope", "760m"), recompute="chunks")
patterns = model.level_patterns()


def level(name: str, period_tokens: int, **options: object) -> LevelConfig:
    return LevelConfig(name, patterns.get(name, ("rest",)), period_tokens, lr=1.25e-3, weight_decay=0.1, **options)


config = RunConfig(
    name="hope-760m",
    output="/mnt/nltrain/runs/hope-760m",
    model=model,
    data=DataConfig(prefix="s3://my-bucket/fineweb-edu/shards", seq_len=4096),
    levels=LevelsConfig(
        levels=(
            level("base", QUANTUM, zero_stage=2),
            level("fast", 2 * QUANTUM),
            level("mid", 8 * QUANTUM),
            level("slow", 32 * QUANTUM),
        ),
        quantum_tokens=QUANTUM,
        schedule=ScheduleConfig("cosine", warmup_tokens=1_000_000_000, total_tokens=TOTAL_TOKENS, min_lr_fraction=0.1),
        dtype="bf16",
        reduce_dtype="bf16",
        fold_every_tokens=1024 * QUANTUM,
    ),
    checkpoint=CheckpointConfig(
        url="s3://my-bucket/runs", every_tokens=1024 * QUANTUM, keep_last=3, keep_every_tokens=10_000_000_000
    ),
    train=TrainConfig(
        total_tokens=TOTAL_TOKENS,
        micro_batch_size=4,
        validate_every_tokens=1024 * QUANTUM,
        validation_sequences=256,
    ),
    cluster=ClusterConfig(max_workers=32, min_workers=16, device="cuda", cpus_per_worker=8.0, threads_per_worker=4),
)

if __name__ == "__main__":
    sys.exit(main(config))
