"""What the guard left out, by name: which samples of which rank, and why. Read on the host when a log line is due."""

from collections.abc import Sequence
from typing import Any

import torch

REASONS = ("", "loss not finite", "loss spike")  # by verdict of the guard
MOST_NAMED = 8  # parts that a line for people names


class LeftOut:
    """This rank's parts of the micro-steps since the last `take`."""

    def __init__(self) -> None:
        self._verdicts: list[torch.Tensor] = []
        self._parts: list[tuple[tuple[int, ...], int]] = []

    def add(self, samples: tuple[int, ...], num_targets: int, verdict: torch.Tensor) -> None:
        """One micro-step: its global sample indices, its targets, the guard's verdict on the device (0: it counts)."""
        self._verdicts.append(verdict)
        self._parts.append((samples, num_targets))

    def take(self) -> list[dict[str, Any]]:
        """[{samples, tokens (targets), reason}] of what was left out of this rank. A host sync."""
        verdicts = torch.stack(self._verdicts).tolist() if self._verdicts else []
        found = [
            {"samples": list(samples), "tokens": num_targets, "reason": REASONS[verdict]}
            for (samples, num_targets), verdict in zip(self._parts, verdicts, strict=True)
            if verdict
        ]
        self._verdicts.clear()
        self._parts.clear()
        return found


def left_out_line(parts: Sequence[dict[str, Any]]) -> str:
    """One line for people. `parts`: as from `take`, each with its rank."""
    named = [
        f"rank {part['rank']}: samples {', '.join(map(str, part['samples']))} ({part['reason']})"
        for part in parts[:MOST_NAMED]
    ]
    if len(parts) > MOST_NAMED:
        named.append(f"and {len(parts) - MOST_NAMED} more, all in the row")
    return f"left out {sum(part['tokens'] for part in parts):,} tokens: {'; '.join(named)}"
