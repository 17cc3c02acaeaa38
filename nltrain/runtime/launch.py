"""Puts a run on a Ray cluster: one Ray Train worker per rank, restarted as a group when one is lost.

Ray decides where ranks run, failures.py whether to try again. A run resumes from our own committed checkpoints, so Ray
uploads nothing, and a resubmitted job resumes exactly like a restarted group. On SIGTERM (`ray job stop`) the ranks
save before they end.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from nltrain.checkpoint.catalog import attempts
from nltrain.config import RunConfig, describe, override, to_dict
from nltrain.errors import UserError
from nltrain.network import why_unreachable
from nltrain.runtime.config import STOP_WAIT_S, ClusterConfig
from nltrain.runtime.preflight import (
    check_run_can_start,
    check_shared,
    describe_places,
    settle_assignments,
    settle_config,
)
from nltrain.store import StoreError, open_store
from nltrain.store.places import as_uri, join_url
from nltrain.terminal import print_anything
from nltrain.track.events import put_event

ADDRESS_VARIABLE = "RAY_ADDRESS"
ROOT = Path(__file__).resolve().parents[2]
ADDRESS_TIMEOUT_S = 5.0
STOPPED_EXIT_CODE = 128 + signal.SIGTERM


class LaunchError(UserError, RuntimeError):
    """The run could not be put on the cluster, or ended there with an error."""


def main(config: RunConfig, arguments: Sequence[str] | None = None) -> int:
    """The main function of every job file: reads overrides, makes a dry run or the run. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = "--dry-run" in arguments
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {Path(sys.argv[0]).name} [--dry-run] [field=value ...]\n\n{describe(config)}")
        return 0
    try:
        assignments = [argument for argument in arguments if argument != "--dry-run"]
        config = settle_config(override(config, settle_assignments(assignments))).resolved()
        if dry_run:
            from nltrain.plan import dry_run as show

            print(describe(config), show(config), sep="\n\n")
            return 0
        result = launch(config)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return STOPPED_EXIT_CODE if result["left"] == "stopped" else 0


def launch(config: RunConfig) -> dict[str, Any]:
    """Run `config` on the cluster at RAY_ADDRESS and wait for its end.

    Returns {"left": "finished" or "stopped", "tokens": T}. Raises LaunchError with one line: what, where, what to do.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise LaunchError(
            f"{ADDRESS_VARIABLE} is not set: start this file with `ray job submit --working-dir . -- python jobs/...`, "
            f"or set {ADDRESS_VARIABLE} to your cluster's host:port"
        )
    print_anything()
    print(describe(config), describe_places(config), sep="\n", flush=True)
    _check_address(address)
    check_run_can_start(config)
    config = _afresh(config)
    for name, value in _ray_settings(config.cluster).items():
        os.environ.setdefault(name, value)
    import ray

    connect(ray, address)
    from nltrain.runtime.controller import stop_wait_s

    _warn(ray, config, stop_wait_s())
    trainer = _trainer(config)
    # Where the job was not submitted, the user alone decides when to kill it.
    submitted = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    with _Stop(ray, trainer, stop_wait_s() if submitted else math.inf) as stop:
        try:
            result = trainer.fit()
        except Exception as error:
            if stop.asked.is_set():
                print("stopped without a checkpoint of this moment: the run goes on from its newest one", flush=True)
                return {"left": "stopped", "tokens": 0}
            reason = _reason(config, trainer, error)
            _note_end(config, trainer, reason)
            raise LaunchError(reason) from error
    return dict(result.return_value)


def _trainer(config: RunConfig) -> Any:
    """The Trainer of the run, for the cluster that this process is connected to."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig

    from nltrain.runtime.controller import CheckDriver, SaveOnSigterm, Trainer
    from nltrain.runtime.worker import train_on_worker

    cluster = config.cluster
    gpus = {"GPU": 1} if cluster.device == "cuda" else {}
    return Trainer(
        train_on_worker,
        train_loop_config=to_dict(config),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers or 1, cluster.max_workers) if cluster.elastic else cluster.max_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": cluster.cpus_per_worker} | gpus,
            placement_strategy=cluster.placement,
            elastic_resize_monitor_interval_s=cluster.resize_check_s,
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(cluster.process_group_timeout_s)),
        run_config=RayRunConfig(
            # A name of its own each time: Ray would otherwise resume its view of an earlier job.
            name=f"ray_train-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            # Every node has to reach it; the only place of which that is certain is where the checkpoints go.
            storage_path=as_uri(join_url(config.checkpoint.url, config.name)),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": _worker_environment(cluster)},
            callbacks=[SaveOnSigterm(), CheckDriver(cluster.device)],
        ),
    )


class _Stop:
    """While it is open, the first SIGTERM asks the ranks to save and end; `fit` then returns."""

    def __init__(self, ray: Any, trainer: Any, wait_s: float) -> None:
        self.asked = threading.Event()
        self._wait_s, self._killed_s = wait_s, math.inf
        self._ray, self._trainer = ray, trainer
        self._before: Any = None

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if not self.asked.is_set():
            self.asked.set()
            self._killed_s = time.monotonic() + self._wait_s
            # Off this thread: it may be in the middle of a call to Ray.
            threading.Thread(target=self._ask, name="nltrain-stop", daemon=True).start()

    def _ask(self) -> None:
        print("stopping: the ranks save and end", flush=True)
        while self._trainer.controller is None:
            time.sleep(0.1)
        with contextlib.suppress(self._ray.exceptions.RayError):  # it may have ended in between
            if not self._ray.get(self._trainer.controller.stop.remote(self._killed_s - time.monotonic())):
                self._ray.get(self._trainer.controller.abort.remote())


def _warn(ray: Any, config: RunConfig, stop_wait_s: float) -> None:
    """Print what does not stop the run from starting but may keep it from training or saving."""
    _check_size(ray, config.cluster)
    if warning := check_shared(config, sum(node["Alive"] for node in ray.nodes())):
        print(warning, flush=True)
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and stop_wait_s < STOP_WAIT_S:
        print(
            f"warning: this cluster kills a stopped job after {stop_wait_s:g} s, too soon to save a checkpoint: "
            f"set RAY_JOB_STOP_WAIT_TIME_S={STOP_WAIT_S} where `ray start` runs",
            flush=True,
        )


def _check_size(ray: Any, cluster: ClusterConfig) -> None:
    """Print that the cluster is too small, which would otherwise be a silent wait; a cluster may still grow."""
    resource, each = ("GPU", 1.0) if cluster.device == "cuda" else ("CPU", cluster.cpus_per_worker)
    there = ray.cluster_resources().get(resource, 0.0)
    needed = each * (cluster.min_workers or cluster.max_workers)
    if there < needed:
        print(
            f"waiting for nodes: {cluster.min_workers or cluster.max_workers} workers need {needed:g} {resource}, the "
            f"cluster has {there:g}; add nodes, or lower cluster.max_workers or cluster.min_workers",
            flush=True,
        )


def _check_address(address: str) -> None:
    if why := why_unreachable(address, ADDRESS_TIMEOUT_S):
        raise LaunchError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address} ({why}): check the address, or start a cluster"
        )


def _afresh(config: RunConfig) -> RunConfig:
    """resume=never holds for this submission: a group that restarts within it resumes from its own checkpoints."""
    if config.checkpoint.resume != "never":
        return config
    newest = max(attempts(open_store(config.checkpoint.url), config.name), default=0)
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto", ignore_attempts_up_to=newest))


def connect(ray: Any, address: str) -> None:
    """Join the cluster at `address`, with this code for its workers. Raises LaunchError with one line."""
    try:
        # The code travels with the run, so that it need not be installed on the nodes.
        runtime_env = {"py_modules": [str(ROOT / "nltrain"), str(ROOT / "kernels")]}
        ray.init(address=address, log_to_driver=True, logging_level="WARNING", runtime_env=runtime_env)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address} ({first}): check the address and "
            f"RAY_AUTH_TOKEN_PATH"
        ) from error


def _ray_settings(cluster: ClusterConfig) -> dict[str, str]:
    """Ray Train's settings, as variables of the environment; a variable that is set already is kept."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.health_check_interval_s),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.group_start_timeout_s),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": str(max(1.0, cluster.health_check_interval_s)),
    }


def _worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(cluster.threads_per_worker), "DS_ACCELERATOR": cluster.device}
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _note_end(config: RunConfig, trainer: Any, reason: str) -> None:
    """Note why the run has failed, for `nltrain status`, where no controller has done it."""
    if trainer.verdict is None:
        with contextlib.suppress(StoreError):  # best effort: the reason is also the last line of the log
            put_event(open_store(config.checkpoint.url), config.name, "failure", "job", reason=reason, final=True)


def _reason(config: RunConfig, trainer: Any, error: BaseException) -> str:
    """The last line of the job's log: why the run ended and what to do. Prints the traceback of the cause."""
    if trainer.verdict is None:
        text = str(error).strip().splitlines()
        return text[-1] if text else type(error).__name__
    failure, verdict = trainer.verdict
    if failure.type_name == "StaleAttemptError":
        return f"run {config.name} ended here: {failure.text}. The newer attempt goes on; give another run another name"
    if failure.traceback:
        print(failure.traceback, file=sys.stderr, flush=True)
    return (
        f"run {config.name} stopped: {failure.text}; {verdict.why}. Mend the cause and submit the same job again: it "
        f"goes on from its newest checkpoint in {config.checkpoint.url}"
    )
