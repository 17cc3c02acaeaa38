#!/usr/bin/env python
"""Hope at 1.3 billion parameters on 512 GPUs: a quantum of 2M tokens, so that every GPU has a sequence; lr by sqrt.

ray job submit --working-dir . -- python jobs/hope_1p3b_512.py data.prefix=s3://B/shards checkpoint.url=s3://B/runs
python jobs/hope_1p3b_512.py --dry-run      # prints the config and the plan, needs no GPU
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.hope_1p3b import config as on_64
from nltrain.levels.recipes import larger_quantum
from nltrain.runtime.launch import main

WORKERS = 512

config = replace(
    on_64,
    name="hope-1p3b-512",
    output="/mnt/nltrain/runs/hope-1p3b-512",
    levels=larger_quantum(on_64.levels, 4),
    train=replace(on_64.train, micro_batch_size=1),
    cluster=replace(on_64.cluster, max_workers=WORKERS, min_workers=WORKERS // 2),
)

if __name__ == "__main__":
    sys.exit(main(config))
