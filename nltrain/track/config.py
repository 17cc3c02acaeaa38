"""What is logged, how often, and where it is shown."""

from dataclasses import dataclass
from typing import Literal

from nltrain.errors import require


@dataclass(frozen=True)
class TrackConfig:
    """Metrics always go to JSONL files in the run's folder; W&B is a view of them."""

    log_every_quanta: int = 1
    """Quanta between two progress lines and metric rows; each costs one small all-reduce and one host sync."""
    wandb: Literal["auto", "offline", "online", "off"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""
    wandb_project: str = "nltrain"
    """W&B project."""
    wandb_dir: str | None = None
    """Folder of W&B's own files; none: wandb/ in the run's folder."""

    def __post_init__(self) -> None:
        require(self.log_every_quanta >= 1, "track.log_every_quanta", self.log_every_quanta, "must be at least 1")
