"""The facts of one machine, for `nltrain doctor`: readers of what the checks of health.py judge. No Ray.

A value that cannot be read keeps its default, which the check counts as missing.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch

from nltrain.runtime.health import NodeFacts, StoreFacts
from nltrain.runtime.probe import read_driver
from nltrain.store import StoreError, open_store

PACKAGES = (
    "torch", "deepspeed", "ray", "webdataset", "wandb", "boto3", "tokenizers", "safetensors", "numpy", "triton",
)  # fmt: skip
WANDB_URL = "https://api.wandb.ai"
WANDB_TIMEOUT_S = 5.0
STORE_PROBE_BYTES = 32 << 20
STORE_ATTEMPTS, STORE_TIMEOUT_S = 2, 20.0
TRANSPORTS = ("NET/", "P2P", "SHM", "NVLS", "CollNet")


def node_facts(name: str, num_gpus: int) -> NodeFacts:
    """All facts of this machine but its clock, which only another machine can compare, and the store."""
    return NodeFacts(
        name=name,
        python=platform.python_version(),
        packages=versions(),
        shm_bytes=shm_bytes(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory_bytes=_limit(resource.RLIMIT_MEMLOCK),
        num_gpus=num_gpus,
        driver=read_driver() if num_gpus else "",
        torch_cuda=torch.version.cuda,
        fabric_cards=len(list(Path("/sys/class/infiniband").glob("*"))),
        fabric_devices=len(list(Path("/dev/infiniband").glob("uverbs*"))),
        wandb_key=bool(os.environ.get("WANDB_API_KEY")) or _in_netrc(),
        wandb_error=wandb_error(),
    )


def versions() -> dict[str, str]:
    """{package: version} of those of PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def shm_bytes(folder: str = "/dev/shm") -> int:
    """Size of the shared memory; 0 where there is none."""
    return shutil.disk_usage(folder).total if os.path.isdir(folder) else 0


def wandb_error(url: str | None = None) -> str:
    """Why W&B's server does not answer; empty where it answers, even with an HTTP error."""
    url = url or os.environ.get("WANDB_BASE_URL", WANDB_URL)
    try:
        urllib.request.urlopen(url, timeout=WANDB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"{urlsplit(url).netloc or url}: {reason}"
    return ""


def store_facts(url: str, name: str, num_bytes: int = STORE_PROBE_BYTES) -> StoreFacts:
    """Put, get, list and delete an object of our own below `url`/doctor."""
    store = open_store(url, attempts=STORE_ATTEMPTS, timeout_s=STORE_TIMEOUT_S)
    key, data = f"doctor/{name.replace('/', '-')}-{uuid.uuid4().hex}", os.urandom(num_bytes)
    found = StoreFacts()

    def attempt(verb: str, action: Callable[[], bool | None]) -> float:
        """Bytes per second; the action returns False where what it saw is not right."""
        started_s = time.monotonic()
        try:
            right = action()
        except StoreError as error:
            found.errors[verb] = str(error)
            return 0.0
        if right is False:
            found.errors[verb] = f"{store.url}/{key}: not what was put"
        return num_bytes / max(time.monotonic() - started_s, 1e-9)

    found.put_bytes_per_s = attempt("put", lambda: store.put(key, data))
    if "put" not in found.errors:
        found.get_bytes_per_s = attempt("get", lambda: store.get(key) == data)
    attempt("list", lambda: "put" in found.errors or key in [item.key for item in store.list("doctor/")])
    attempt("delete", lambda: store.delete(key))
    return found


def transports_in(log: str) -> tuple[str, ...]:
    """What NCCL's own log (NCCL_DEBUG=INFO) says that its channels go through: "NET/OFI", "P2P/CUMEM", ..."""
    found = set()
    for line in log.splitlines():
        _, via, rest = line.partition(" via ")
        if via and rest.startswith(TRANSPORTS):
            found.add("/".join(rest.split()[0].split("/")[:2]))
    return tuple(sorted(found))


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def _in_netrc() -> bool:
    path = Path("~/.netrc").expanduser()
    return path.is_file() and "wandb" in path.read_text()
