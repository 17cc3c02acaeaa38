#!/usr/bin/env python
"""Hope at 760 million parameters on 30 billion tokens, the smaller of the sizes that the paper reports.

ray job submit --working-dir . -- python jobs/hope_760m.py data.prefix=s3://B/shards checkpoint.url=s3://B/runs
python jobs/hope_760m.py --dry-run      # prints the config and the plan, needs no GPU
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.paper import paper_run
from nltrain.runtime.launch import main

config = paper_run(
    "hope-760m",
    "760m",
    total_tokens=30_000_000_000,
    warmup_tokens=1_000_000_000,
    lr=1.25e-3,
    workers=32,
    micro_batch_size=4,
)

if __name__ == "__main__":
    sys.exit(main(config))
