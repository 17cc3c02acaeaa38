"""An attempt hears of a newer one while it trains, also after the store was away for a while."""

import time
from pathlib import Path

from nltrain.checkpoint.catalog import claim_attempt
from nltrain.checkpoint.fence import Fence
from nltrain.store import StoredObject, StoreError, open_store
from tests.checkpoint.support import FaultyStore


class Unlisted(FaultyStore):
    """Its first listings fail, as in an outage."""

    outage = 3

    def list(self, prefix: str = "") -> list[StoredObject]:
        if self.outage:
            self.outage -= 1
            raise StoreError(f"{self.url}: list failed 7 times; check the network")
        return self._store.list(prefix)


def test_the_fence_notices_a_newer_attempt_within_its_interval_and_outlives_an_outage(tmp_path: Path) -> None:
    store = Unlisted(open_store(str(tmp_path)))
    claim_attempt(open_store(str(tmp_path)), "fenced", 1)
    fence = Fence(store, "fenced", 1, every_s=0.05)
    deadline = time.monotonic() + 10
    while store.outage and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert fence.stale == ""
    claim_attempt(open_store(str(tmp_path)), "fenced", 2)
    while not fence.stale and time.monotonic() < deadline:
        time.sleep(0.02)
    assert fence.stale.startswith("attempt 1 of run fenced is stale: attempt 2 has begun")
    fence.close()
