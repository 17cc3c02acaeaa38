"""What software wrote a checkpoint: versions and the git commit, recorded with each save."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "deepspeed", "ray", "numpy", "safetensors", "webdataset", "nltrain")


def environment() -> dict[str, Any]:
    """{python, package: version or None, git_commit: hash, with +dirty for uncommitted changes, or None}."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["git_commit"] = _git_commit(Path(__file__).parent)
    return found


def _git_commit(folder: Path) -> str | None:
    """None outside a git work tree, for an installed package for example."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
