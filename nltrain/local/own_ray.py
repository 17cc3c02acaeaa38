"""Ray within one process, on this machine alone, for jobs that are started without a cluster (prepare_shards).

It ignores all variables of the user's environment that name a place of Ray, leaves nothing in the home folder, waits as
long as a busy machine needs and tries again; a start that fails for good is one OwnRayError.
"""

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nltrain.errors import UserError
from nltrain.local.environment import reach_loopback_directly, short_folder
from nltrain.local.patience import be_patient
from nltrain.network import why_unreachable

START_ATTEMPTS = 3
PAUSE_S = 2.0
ADDRESS_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 100 << 20


class OwnRayError(UserError, RuntimeError):
    """Ray did not start on this machine; the message is one line."""


@contextmanager
def own_ray(num_cpus: int, environment: dict[str, str]) -> Iterator[Any]:
    """The ray module, started with `num_cpus` logical CPUs here, or connected to the cluster at RAY_ADDRESS.

    environment: added variables of the tasks. Raises OwnRayError.
    """
    address = os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="nltrain-ray-", dir=None if address else short_folder()) as folder:
        options: dict[str, Any] = {}
        if not address:
            _be_local(Path(folder))
            options = {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": folder}
            options["object_store_memory"] = OBJECT_STORE_BYTES
            options["_node_ip_address"] = "127.0.0.1"
        elif why := why_unreachable(address, ADDRESS_TIMEOUT_S):
            raise _no_cluster(address, why)
        import ray  # reads its environment when it is imported

        be_patient()
        _start(ray, address, runtime_env={"env_vars": environment}, logging_level=logging.WARNING, **options)
        try:
            yield ray
        finally:
            ray.shutdown()


def _be_local(folder: Path) -> None:
    """Set this process's environment for a Ray of its own. Variables of S3 and of proxies stay: the data need them."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    reach_loopback_directly()
    # A token file of its own: Ray would leave one in the home folder, which later clusters then demand.
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    if not os.path.isdir(os.path.expanduser("~")) or not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["HOME"] = str(folder)
    os.environ.setdefault("USER", "nltrain")
    os.environ.setdefault("LOGNAME", "nltrain")


def _start(ray: Any, address: str | None, **options: Any) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        began_s = time.monotonic()
        try:
            ray.init(**options)
            return
        except Exception as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            ray.shutdown()
            if address:
                raise _no_cluster(address, why) from error
            if attempt == START_ATTEMPTS:
                raise OwnRayError(f"Ray did not start on this machine in {attempt} tries; the last: {why}") from error
            seconds = time.monotonic() - began_s
            print(f"Ray did not start after {seconds:.0f} s ({why}); try {attempt + 1} of {START_ATTEMPTS}", flush=True)
            time.sleep(PAUSE_S)


def _no_cluster(address: str, why: str) -> OwnRayError:
    return OwnRayError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({why}): check the address and RAY_AUTH_TOKEN_PATH, or "
        "unset it to work on this machine"
    )
