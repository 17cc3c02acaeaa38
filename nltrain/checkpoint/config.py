"""When to save, what to keep, how much to trust: the settings of a run's checkpoints."""

from dataclasses import dataclass

from nltrain.errors import require

_MIN_FILE_BYTES, _MAX_FILE_BYTES = 1 << 16, 5_000_000_000


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, what it keeps, and from what it goes on. All of it may differ on resume."""

    url: str
    """Folder or s3://bucket/prefix that holds all runs; a run's checkpoints lie under <url>/<run>/checkpoints."""
    every_tokens: int = 0
    """Save when T passes a multiple of this; the fold falls there, so it is exact at any world size. 0: off."""
    every_minutes: float = 0.0
    """Also save at the next fold when this many minutes have passed since the last save. 0: off."""
    keep_last: int = 3
    """Complete checkpoints kept, newest first. At least 1; 2 or more leave one to fall back to."""
    keep_every_tokens: int = 0
    """Keep for ever the first checkpoint at or after each multiple of this many tokens. 0: none."""
    resume: str = "auto"
    """auto: newest sound one; URL[@tokens] of a run's folder: that one, once; never: this submission starts afresh."""
    ignore_attempts_up_to: int = 0
    """auto passes over checkpoints of these attempts; a job that is submitted with resume=never sets it."""
    verify: str = "hashes"
    """On load: hashes (read and hash every file, overlapped with the copy) or sizes (one listing)."""
    may_change: tuple[str, ...] = ()
    """Patterns of config fields (data.num_workers, levels.*.lr) that may differ from the stored config on resume."""
    asynchronous: bool = True
    """Training waits only for the copy to host memory; False: it waits for the commit."""
    when_busy: str = "wait"
    """A save that comes while one is in flight: wait for it, or skip the new one with a message."""
    when_full: str = "fail"
    """After a failed save: fail (try the next one as it is), or make_room (first delete all but the newest one)."""
    other_data: bool = False
    """Go on with other data than the checkpoint's (dataset, data.seed, weights, ...); noted in the lineage."""
    max_failures: int = 3
    """Failed saves in a row after which the run stops; each one before is logged as an error."""
    max_file_bytes: int = 64 << 20
    """Largest file written, bytes; a rank's share is cut into files of at most this size."""
    num_threads: int = 4
    """Files written or read at a time by one rank."""
    upload_process: bool = True
    """Files go to S3 from a process beside the rank, because an upload on a thread slows the training loop; it needs
    num_threads times max_file_bytes of host memory. False: on threads of the rank."""
    timeout_s: float = 1800.0
    """Longest wait for a save, or for the other ranks in one, seconds."""

    def __post_init__(self) -> None:
        require(bool(self.url), "checkpoint.url", self.url, "names no place: give a folder or s3://bucket/prefix")
        for name, least in (
            ("every_tokens", 0),
            ("every_minutes", 0),
            ("keep_last", 1),
            ("keep_every_tokens", 0),
            ("max_failures", 1),
            ("num_threads", 1),
        ):
            value = getattr(self, name)
            require(value >= least, f"checkpoint.{name}", value, f"must be at least {least}")
        for name, choices in (
            ("verify", ("hashes", "sizes")),
            ("when_busy", ("wait", "skip")),
            ("when_full", ("fail", "make_room")),
        ):
            value = getattr(self, name)
            require(value in choices, f"checkpoint.{name}", value, f"choose {' or '.join(choices)}")
        require(
            _MIN_FILE_BYTES <= self.max_file_bytes <= _MAX_FILE_BYTES,
            "checkpoint.max_file_bytes",
            self.max_file_bytes,
            f"must lie in [{_MIN_FILE_BYTES}, {_MAX_FILE_BYTES}]: S3 takes no larger object in one request",
        )
        require(self.timeout_s > 0, "checkpoint.timeout_s", self.timeout_s, "must be positive")
        require(bool(self.resume), "checkpoint.resume", self.resume, "choose auto, never or URL[@tokens]")
