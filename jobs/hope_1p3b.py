#!/usr/bin/env python
"""Hope at 1.3 billion parameters on 100 billion tokens, the size of the paper's largest language model.

ray job submit --working-dir . -- python jobs/hope_1p3b.py data.prefix=s3://B/shards checkpoint.url=s3://B/runs
python jobs/hope_1p3b.py --dry-run      # prints the config and the plan, needs no GPU
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.paper import paper_run
from nltrain.runtime.launch import main

config = paper_run(
    "hope-1p3b",
    "1p3b",
    total_tokens=100_000_000_000,
    warmup_tokens=2_000_000_000,
    lr=4e-4,
    workers=64,
    micro_batch_size=2,
)

if __name__ == "__main__":
    sys.exit(main(config))
