"""The environment of processes that run on this machine alone: separate from the user's own.

A local cluster and what it starts get a home folder of their own, so that no profile, netrc, token or cache file of the
user is read or written, and none of the variables that send Ray, S3 or W&B elsewhere. Variables that name no such place
(PATH, PYTHONPATH, LD_LIBRARY_PATH, thread counts) are kept.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from nltrain.errors import UserError

# Variables of these families can send a local run to another machine, account or network interface.
FOREIGN = ("AWS_", "RAY_", "WANDB_", "GLOO_", "NCCL_", "BOTO_")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Ray asks these addresses which cloud it runs in; a proxy could not answer for this machine.
METADATA = ("169.254.169.254", "metadata.google.internal")
# Unix sockets need short paths, wherever TMPDIR points.
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class EnvironmentRefusedError(UserError, RuntimeError):
    """This machine lacks something that a local run needs; the message says what."""


def without_foreign(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables of FOREIGN and without proxies: what is local needs none."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy")
    }


def own_home(folder: Path) -> dict[str, str]:
    """Makes `folder` the home of what is started with these variables; also where the user has none, or no name."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(folder),
        # A uid without an entry in /etc/passwd has no name that getpass could find.
        "USER": "nltrain",
        "LOGNAME": "nltrain",
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XDG_DATA_HOME": str(folder / "data"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        # A netrc with a default entry would replace the token of every request to the local cluster.
        "NETRC": os.devnull,
        # Files and logs are UTF-8 under every locale.
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "NO_PROXY": ",".join(LOOPBACK),
        "no_proxy": ",".join(LOOPBACK),
    }


def short_folder() -> Path:
    """A writable folder with a short path, for links to where sockets lie. Raises EnvironmentRefusedError."""
    for name in SHORT_FOLDERS:
        if os.path.isdir(name) and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    raise EnvironmentRefusedError(
        f"none of {', '.join(SHORT_FOLDERS)} is a writable folder: Unix sockets need a short path; make one writable"
    )


def reach_loopback_directly() -> None:
    """In this process: requests to this machine use no proxy; those to other hosts do as before."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, os.environ.get("no_proxy", "")).split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join([*hosts, *(host for host in (*LOOPBACK, *METADATA) if host not in hosts)])


@contextlib.contextmanager
def added_to_environment(added: Mapping[str, str]) -> Iterator[None]:
    """os.environ has these variables inside the with block, and is as before after it; tempfile follows TMPDIR."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    tempfile.tempdir = None  # read TMPDIR again
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None
