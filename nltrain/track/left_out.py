"""Which samples of which rank the guard left out, and why. Read on the host when a log line is due."""

from typing import Any

import torch

REASONS = ("", "loss not finite", "loss spike")  # by verdict of the guard


class LeftOut:
    """This rank's parts of the micro-steps since the last `take`; verdicts stay on the device until then."""

    def __init__(self) -> None:
        """Nothing is collected yet."""
        self._verdicts: list[torch.Tensor] = []
        self._parts: list[tuple[tuple[int, ...], int]] = []

    def add(self, samples: tuple[int, ...], num_targets: int, verdict: torch.Tensor) -> None:
        """One micro-step: its global sample indices, its number of targets, the guard's verdict (0: it counts)."""
        self._verdicts.append(verdict)
        self._parts.append((samples, num_targets))

    def take(self) -> list[dict[str, Any]]:
        """[{samples, tokens (targets), reason}] of this rank's parts that were left out. A host sync."""
        verdicts = torch.stack(self._verdicts).tolist() if self._verdicts else []
        found = [
            {"samples": list(samples), "tokens": num_targets, "reason": REASONS[verdict]}
            for (samples, num_targets), verdict in zip(self._parts, verdicts, strict=True)
            if verdict
        ]
        self._verdicts.clear()
        self._parts.clear()
        return found
