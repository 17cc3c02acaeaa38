#!/usr/bin/env python
"""A small Hope for one machine: the job of `make demo`, and the same path as the 1.3B one with other numbers.

ray job submit --working-dir . -- python jobs/hope_tiny.py output=/runs/a data.prefix=s3://b/corpus checkpoint.url=s3://b/runs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nltrain.checkpoint.config import CheckpointConfig
from nltrain.config import RunConfig, TrainConfig
from nltrain.data.config import DataConfig
from nltrain.levels.config import LevelConfig, LevelsConfig, ScheduleConfig
from nltrain.model import preset
from nltrain.runtime.config import ClusterConfig
from nltrain.runtime.launch import main
from nltrain.track.config import TrackConfig

SEQ_LEN = 1024  # 16 chunks: writes are read long after they were made
QUANTUM = 4 * SEQ_LEN

model = preset("hope", "tiny")
patterns = model.level_patterns()


def level(name: str, period_tokens: int, **options: object) -> LevelConfig:
    """One level of this job: learning rate and weight decay are those of all its levels."""
    return LevelConfig(name, patterns.get(name, ("rest",)), period_tokens, lr=4e-3, weight_decay=0.1, **options)


config = RunConfig(
    name="hope-tiny",
    output="/tmp/nltrain/hope-tiny",
    model=model,
    data=DataConfig(prefix="", seq_len=SEQ_LEN, buffer_bytes=16 << 20),
    levels=LevelsConfig(
        levels=(
            level("base", QUANTUM, zero_stage=2),
            level("fast", QUANTUM),
            level("mid", 4 * QUANTUM),
            level("slow", 16 * QUANTUM),
        ),
        quantum_tokens=QUANTUM,
        schedule=ScheduleConfig("cosine", warmup_tokens=20 * QUANTUM, min_lr_fraction=0.1),
    ),
    checkpoint=CheckpointConfig(url="/tmp/nltrain/checkpoints", every_tokens=50 * QUANTUM, keep_last=3),
    train=TrainConfig(
        total_tokens=450 * QUANTUM,
        micro_batch_size=2,
        validate_every_tokens=100 * QUANTUM,
        validation_sequences=24,
        sample_tokens=64,
    ),
    track=TrackConfig(log_every_quanta=5),
    cluster=ClusterConfig(max_workers=2),
)

if __name__ == "__main__":
    sys.exit(main(config))
