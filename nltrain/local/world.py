"""One machine as a small cluster: an S3 server, a Ray cluster and the jobs on it; the demo, the drill and tests use it.

Inside the with block, this process and its children find the S3 server and the cluster; on leaving, also by Ctrl-C or
an error, every process that was started is ended, temporary files are removed, and os.environ is as before.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from nltrain.local.cluster import OBJECT_STORE_BYTES, LocalCluster, LocalNode
from nltrain.local.embedded_s3 import EmbeddedS3
from nltrain.local.environment import added_to_environment, own_home
from nltrain.local.fault_proxy import FaultProxy
from nltrain.local.job import Job
from nltrain.local.processes import Owner

ROOT = Path(__file__).resolve().parents[2]
# One node on two quiet cores; what takes longer measures how busy the machine is.
QUIET_START_S = 4.5


class LocalWorld:
    """`folder` receives everything: Ray's logs in ray/, temporary files in tmp/; it is made where it is missing.

    After __enter__: `owner` of all processes, `s3`, `cluster`, and `slowness`.
    """

    def __init__(
        self,
        folder: Path,
        bucket: str,
        num_cpus: int,
        *,
        num_nodes: int = 1,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        can_cut_store: bool = False,
        with_own_home: bool = False,
    ) -> None:
        """num_cpus: logical CPUs of each of `num_nodes` nodes, the head among them; object_store_bytes: of each node.

        can_cut_store: S3 is reached through a proxy, so that `store_cut` works.
        with_own_home: this process, too, has a home folder in tmp/, and reads and writes nothing in the user's.
        """
        self.folder, self.bucket, self.num_nodes = folder, bucket, num_nodes
        self.slowness = 1.0
        """How many times longer the cluster took to start than on a quiet machine; at least 1."""
        self._num_cpus, self._object_store_bytes = num_cpus, object_store_bytes
        self._can_cut_store, self._with_own_home = can_cut_store, with_own_home
        self._proxy: FaultProxy | None = None
        self._all = contextlib.ExitStack()
        self._services = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            scratch = self.folder / "tmp"
            scratch.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            self.owner = Owner(self.folder)
            stack.callback(self.owner.close)
            home = own_home(scratch / "home") if self._with_own_home else {}
            # Before the services: their processes inherit it.
            stack.enter_context(
                added_to_environment({"TMPDIR": str(self.owner.short / "tmp")} | self.owner.environment | home)
            )
            stack.callback(self.stop)
            self._start()
            self._all = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._all.close()

    def stop(self) -> None:
        """End cluster, proxy and S3 server, as __exit__ does; some of their processes take seconds more to leave."""
        self._services.close()

    @property
    def nodes(self) -> list[LocalNode]:
        """The nodes beside the head, in the order in which they joined; those that were killed stay in the list."""
        return self.cluster.nodes

    def submit(
        self,
        entrypoint: Sequence[str],
        log: Path,
        root: Path = ROOT,
        job_id: str = "",
        with_working_dir: bool = True,
    ) -> Job:
        """`ray job submit --working-dir . -- entrypoint` in `root`; returns at once. `log` receives what it prints."""
        return Job(submit_arguments(entrypoint, job_id, with_working_dir), root, log, self.cluster.client_environment)

    @contextlib.contextmanager
    def store_cut(self) -> Iterator[None]:
        """Inside the with block every request to S3 is reset."""
        assert self._proxy is not None, "LocalWorld(can_cut_store=True) has the proxy that this needs"
        self._proxy.probability = 1.0
        try:
            yield
        finally:
            self._proxy.probability = 0.0

    def _start(self) -> None:
        """Start S3 server, proxy and nodes. `stop` ends what has been started, wherever this ends."""
        services = self._services
        self.s3 = services.enter_context(EmbeddedS3(self.bucket))
        reach_s3 = self.s3.environment()
        if self._can_cut_store:
            self._proxy = services.enter_context(FaultProxy(self.s3.endpoint_url, probability=0.0, kinds=("reset",)))
            reach_s3 |= dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), self._proxy.endpoint_url)
        services.enter_context(added_to_environment(reach_s3))
        began_s = time.monotonic()
        self.cluster = services.enter_context(
            LocalCluster(self.folder, self.owner, self._num_cpus, self._object_store_bytes, **reach_s3)
        )
        for _ in range(self.num_nodes - 1):
            self.cluster.add_node(self._num_cpus)
        self.slowness = max(1.0, (time.monotonic() - began_s) / (QUIET_START_S * self.num_nodes))


def submit_arguments(entrypoint: Sequence[str], job_id: str = "", with_working_dir: bool = True) -> list[str]:
    """The arguments of `ray job submit` for a job that runs in the folder of the command."""
    options = [*(["--submission-id", job_id] if job_id else []), *(["--working-dir", "."] if with_working_dir else [])]
    return [*options, *(["--"] if options else []), *entrypoint]
