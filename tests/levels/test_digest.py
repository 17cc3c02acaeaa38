"""The digest is the hash of all names and fp32 weights, on rank 0."""

import hashlib

from benchmarks._level_toys import SEQ_LEN, Toy, levels
from benchmarks._ranks import Ranks
from nltrain.levels.digest import weights_sha256
from nltrain.levels.scheduler import LevelScheduler


def digests(ranks: Ranks) -> dict[str, str | None]:
    """Of a model at all three stages, and computed by hand from the model before it was sharded."""
    model = Toy(seed=ranks.rank)  # rank 0's weights count
    start = {name: parameter.detach().clone() for name, parameter in Toy(seed=0).named_parameters()}
    scheduler = LevelScheduler(model, levels(ranks.world_size * SEQ_LEN, stages=(3, 2, 1, 1)), SEQ_LEN)
    found = weights_sha256(scheduler)
    names = [name for name, _ in scheduler.weights()]
    scheduler.close()
    expected = hashlib.sha256()
    for name in names:
        expected.update(name.encode())
        expected.update(start[name].numpy().tobytes())
    assert (found is None) == (ranks.rank != 0)
    return {"found": found, "expected": expected.hexdigest()}


CASES = {2: {"digest": digests}}


def test_the_digest_is_the_hash_of_names_and_weights(case):
    result = case(2, "digest")
    assert result["found"] == result["expected"]
