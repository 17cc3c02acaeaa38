"""One hash of all weights: two runs with equal weights have the same hash."""

import hashlib

import torch.distributed as dist

from nltrain.levels.scheduler import LevelScheduler


def weights_sha256(levels: LevelScheduler) -> str | None:
    """Hash of all fp32 master weights, in the levels' order; on rank 0, None elsewhere. A collective."""
    digest = hashlib.sha256()
    for name, weight in levels.weights():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest() if dist.get_rank() == 0 else None
