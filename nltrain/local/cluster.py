"""A Ray cluster of our own on this machine: own ports, temp dir and token, independent of other clusters on the host.

The head runs as `ray start --head --block` in a session of its own. `add_node` starts further raylets on the same host,
for tests and benchmarks that lose nodes. Ray's socket paths must stay below 108 bytes, so its temp dir, which lies in
the run's folder, is reached through a short symbolic link.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from nltrain.errors import UserError
from nltrain.local.environment import own_home, without_foreign
from nltrain.local.processes import Owner
from nltrain.network import free_ports
from nltrain.runtime.config import STOP_WAIT_S

# Longest wait for a start, which takes 5 s on a quiet machine and minutes on a busy one; printed every SAY_EVERY_S.
START_TIMEOUT_S = 900
SAY_EVERY_S = 30.0
START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 150 << 20
# The `ray` command, which waits for the node as long as its raylet lives.
RAY = (sys.executable, "-P", str(Path(__file__).with_name("patience.py")))
# A dead raylet refuses connections and is given up after 5 s; a slow one has 10 s to answer each check.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "5",
    # On a busy machine a raylet's agents take longer to start than Ray allows them.
    "RAY_agent_register_timeout_ms": str(1000 * START_TIMEOUT_S),
}
# By default Ray starts idle workers, which no run can use because each job has an environment of its own, and at the
# end waits 30 s for its own actors.
LEAN = {
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


class ClusterError(UserError, RuntimeError):
    """The cluster did not start or does not answer; the message says where to look."""


class LocalCluster:
    """A head node with `num_cpus` logical CPUs; `folder` is the run folder that `owner.short` leads to."""

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        num_cpus: int,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        **environment: str,
    ) -> None:
        self._folder = folder / "ray"
        self._owner = owner
        self._num_cpus = num_cpus
        self._object_store_bytes = object_store_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._folder.mkdir(parents=True)
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port = free_ports(2)
        self.nodes: list[LocalNode] = []
        self.environment = (
            without_foreign(os.environ)
            | own_home(self._folder / "home")
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
                "RAY_USAGE_STATS_ENABLED": "0",
                # By default Ray gives workers a lower priority than everything else; here they are the purpose.
                "RAY_worker_niceness": "0",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                **HEALTH_CHECKS,
                **LEAN,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
                "PYTHONUNBUFFERED": "1",
            }
            | owner.environment
            | environment
        )

    @property
    def temp_dir(self) -> Path:
        """Ray's folder, by a path short enough for its sockets."""
        return self._owner.short / self._folder.name

    @property
    def job_address(self) -> str:
        """For `ray job submit`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What `ray job submit` needs to find this cluster."""
        return self.environment | {"RAY_ADDRESS": self.job_address}

    def __enter__(self) -> "LocalCluster":
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start()
                return self
            except ClusterError as error:
                if attempt == START_ATTEMPTS:
                    raise
                print(f"{error}; try {attempt + 1} of {START_ATTEMPTS}", flush=True)
                self.port, self.dashboard_port = free_ports(2)
        raise AssertionError("not reached")

    def _start(self) -> None:
        log = (self._folder / "head.log").open("ab")
        client, agent, agent_grpc, runtime_env, metrics = free_ports(5)
        command = [
            *RAY, "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={self.port}", f"--num-cpus={self._num_cpus}", "--num-gpus=0",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
            f"--metrics-export-port={metrics}", f"--object-store-memory={self._object_store_bytes}",
            f"--temp-dir={self.temp_dir}", "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_node(self, num_cpus: int, **environment: str) -> "LocalNode":
        """Another raylet with `num_cpus` logical CPUs joins; returns when the head counts it as alive.

        Its ranks have the variables of `environment` besides the cluster's.
        """
        for attempt in range(START_ATTEMPTS):
            name = f"node_{len(self.nodes) + 1}"
            node = LocalNode(self, self._folder / name, num_cpus, self._object_store_bytes, name, environment)
            self.nodes.append(node)
            try:
                node.start()
            except ClusterError:
                node.stop()
                if attempt == START_ATTEMPTS - 1:
                    raise
            else:
                return node
        raise AssertionError("not reached")

    def stop(self) -> None:
        """End all nodes and everything they started; what ignores SIGTERM is killed by pid."""
        _end(*(node.process for node in self.nodes), self._process)

    def remove_session_files(self) -> None:
        """Drop Ray's session folder (sockets, spill, working dirs); the head's own log stays."""
        for path in [*self._folder.glob("session_*"), *(node.folder for node in self.nodes)]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    def _wait_until_it_answers(self) -> None:
        token, log = (self._folder / "token").read_text(), self._folder / "head.log"
        request = urllib.request.Request(
            f"{self.job_address}/api/version", headers={"Authorization": f"Bearer {token}"}
        )
        # The cluster is on this machine: no proxy.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in _while_starting("the local Ray cluster"):
            if self._process is None or self._process.poll() is not None:
                raise ClusterError(f"the local Ray cluster ended while starting ({_last_line(log)}); see {log}")
            try:
                with direct.open(request, timeout=2):
                    return
            except OSError:  # URLError is one
                continue
        raise ClusterError(f"the local Ray cluster did not answer in {START_TIMEOUT_S} s; see {log}")


def _while_starting(what: str) -> Iterator[None]:
    """Steps of a wait of up to START_TIMEOUT_S, which is printed every SAY_EVERY_S."""
    began_s = said_s = time.monotonic()
    while (now_s := time.monotonic()) - began_s < START_TIMEOUT_S:
        if now_s - said_s > SAY_EVERY_S:
            said_s = now_s
            print(f"{what} is starting, {now_s - began_s:.0f} s so far: the machine is busy", flush=True)
        yield
        time.sleep(0.2)


def _last_line(log: Path) -> str:
    """The last line that a process has printed; of a traceback, that is the line with the error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


class LocalNode:
    """A raylet that has joined a LocalCluster. `node_id` is Ray's, in hex."""

    def __init__(
        self,
        cluster: LocalCluster,
        folder: Path,
        num_cpus: int,
        object_store_bytes: int,
        name: str,
        environment: dict[str, str],
    ) -> None:
        self._environment, self.name = cluster.environment | environment, name
        self._cluster, self.folder, self._num_cpus = cluster, folder, num_cpus
        self._log = folder.with_suffix(".log")
        self._object_store_bytes = object_store_bytes
        self.process: subprocess.Popen[bytes] | None = None
        self.raylet_pid = 0
        self.node_id = ""

    def start(self) -> None:
        """Start the raylet; returns when the head counts the node as alive. Raises ClusterError."""
        agent, agent_grpc, runtime_env, metrics = free_ports(4)
        command = [
            *RAY, "start", f"--address=127.0.0.1:{self._cluster.port}",
            "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--num-cpus={self._num_cpus}",
            "--num-gpus=0", f"--node-name={self.name}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
            f"--metrics-export-port={metrics}", f"--object-store-memory={self._object_store_bytes}",
            "--min-worker-port=0", "--max-worker-port=0",
            # A folder of its own: the nodes' agents would delete each other's unpacked working directories.
            f"--temp-dir={self._cluster.temp_dir / self.name}",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        for _ in _while_starting(self.name):
            if self.process.poll() is not None:
                raise ClusterError(f"{self.name} ended while starting ({_last_line(self._log)}); see {self._log}")
            # `ray start` says so once the head counts the node as alive.
            if "Ray runtime started" in self._log.read_text(errors="replace") and self._find_raylet():
                return
        raise ClusterError(f"{self.name} had not joined after {START_TIMEOUT_S} s; see {self._log}")

    @property
    def alive(self) -> bool:
        """Whether its raylet runs."""
        return psutil.pid_exists(self.raylet_pid) and psutil.Process(self.raylet_pid).status() != psutil.STATUS_ZOMBIE

    def kill(self) -> None:
        """SIGKILL the raylet, as when a machine vanishes: Ray's workers there end with it, its agents linger."""
        os.kill(self.raylet_pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the raylet and what it has started."""
        _end(self.process)

    def _find_raylet(self) -> bool:
        """The raylet among the processes below `ray start`; its command line carries the node's id."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("raylet"):
                    self.raylet_pid = process.pid
                    words = [word for word in process.cmdline() if "--node_id=" in word or "--node-id=" in word]
                    self.node_id = words[0].partition("=")[2] if words else ""
                    return True
        return False


def _end(*processes: subprocess.Popen[bytes] | None) -> None:
    """SIGTERM to all, then SIGKILL to those that have not ended after 10 s."""
    running = [process for process in processes if process and process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
