"""Which nodes a run no longer uses: strikes per node and per GPU, kept beside its checkpoints. No Ray.

A rank whose process dies, whose device gives wrong answers, or that is behind in a hang is a strike against its node;
preemptions, errors of the program and lost connections are not. After `max_node_strikes` within the failure
window the run avoids the node, in this submission and in later ones. Nodes are known by the name they joined with
(`ray start --node-name`, otherwise their address): a raylet that is started again on the same machine is the same node.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from nltrain.track.events import put_event, read_events

KIND = "strike"


class Place(NamedTuple):
    """The node and the GPU of a rank."""

    node_id: str  # Ray's, new with every raylet
    node: str
    gpu: str  # index on the node; empty: none


class Strike(NamedTuple):
    """One failure that counts against a node."""

    time_s: float
    node: str
    gpu: str
    weight: int  # 1; as many as the limit where the device is known to be bad
    text: str


class Strikes:
    """All strikes of a run within the window. `limit` 0: nothing is ever left out."""

    def __init__(self, limit: int, window_s: float, found: Sequence[Strike] = ()) -> None:
        self.limit, self._window_s = limit, window_s
        self._strikes = list(found)

    @classmethod
    def read(cls, limit: int, window_s: float, store: Any, run: str, now_s: float | None = None) -> "Strikes":
        """The strikes that earlier submissions have noted. Raises StoreError."""
        now_s = time.time() if now_s is None else now_s
        rows = read_events(store, run, since_s=now_s - window_s, kinds=(KIND,)) if limit else []
        found = [Strike(row["time_s"], row["node"], row["gpu"], row["weight"], row["text"]) for row in rows]
        return cls(limit, window_s, found)

    def add(self, place: Place, text: str, bad_device: bool, now_s: float) -> Strike:
        """Count one failure against the node of `place`; a bad device reaches the limit at once."""
        strike = Strike(now_s, place.node, place.gpu, max(1, self.limit) if bad_device else 1, text)
        self._strikes.append(strike)
        return strike

    def count(self, node: str, now_s: float) -> int:
        """The strikes against `node` within the window, by weight."""
        return sum(each.weight for each in self._live(now_s) if each.node == node)

    def out(self, now_s: float) -> dict[str, str]:
        """{node that is left out: why, in one line}."""
        if not self.limit:
            return {}
        nodes = {each.node for each in self._live(now_s)}
        return {node: self._why(node, now_s) for node in sorted(nodes) if self.count(node, now_s) >= self.limit}

    def _why(self, node: str, now_s: float) -> str:
        own = [each for each in self._live(now_s) if each.node == node]
        gpus = sorted({each.gpu for each in own if each.gpu})
        on = f" on GPU {', '.join(gpus)}" if gpus else ""
        strikes = f"{len(own)} strike{'s' * (len(own) > 1)} within {self._window_s / 3600:g} hours"
        return f"{strikes}{on}, the last: {own[-1].text}"

    def _live(self, now_s: float) -> list[Strike]:
        return [each for each in self._strikes if now_s - each.time_s < self._window_s]


def note_strike(store: Any, run: str, strike: Strike) -> None:
    """Write the strike beside the run's checkpoints. Raises StoreError."""
    values = {"node": strike.node, "gpu": strike.gpu, "weight": strike.weight, "text": strike.text[:300]}
    put_event(store, run, KIND, "controller", **values)
