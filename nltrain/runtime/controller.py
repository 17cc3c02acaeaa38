"""Ray Train with our own judgement: with patience.py the only file that uses its private names (Ray is pinned for it).

What is ours: which failures are tried again (failures.py) and the note of each beside the checkpoints; a checkpoint
before a resize, so that growing costs no tokens; the user's stop, which lets the ranks save; and counting only nodes
that live and are not being drained. The rest is Ray's: placement, restarts, health, elasticity.
"""

import contextlib
import json
import math
import os
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from nltrain.config import RunConfig, from_dict
from nltrain.data import MissingObjectError, StoreError, open_store
from nltrain.runtime.failures import Failure, FailureLedger, Verdict, summary
from nltrain.runtime.worker import ask_to_leave, on_sigterm, wait_until_left
from nltrain.track.events import put_event
from nltrain.track.status import read_history
from nltrain.track.supervision import Wish

# A note must not hold up a restart: few tries, short silence.
NOTE_ATTEMPTS, NOTE_TIMEOUT_S = 3, 5.0
PROBE_TIMEOUT_S = 3.0


def own_rank() -> int:
    """The world rank of this Ray Train worker."""
    return get_train_context().get_world_rank()


def node_is_leaving() -> bool:
    """Whether Ray has told this worker that a node of its group is being drained. No communication.

    The public ray.train.get_preemption_info is a barrier over all workers; ours have an agreement of their own.
    """
    return get_train_context().preemption_context.preemption_info is not None


def register_with_ray(url: str, metrics: dict[str, Any]) -> None:
    """Name a committed checkpoint of ours as the run's result. Every rank calls it.

    Ray takes only what lies below its own folder, so it gets a pointer: one small file, and no second upload.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoint.json").write_text(json.dumps({"url": url}))
        ray.train.report(metrics, ray.train.Checkpoint(folder) if own_rank() == 0 else None)


class SaveOnSigterm(WorkerCallback):
    """Installs the SIGTERM handler where Python allows it: on the main thread of the worker's process."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


class JudgedFailures(FailurePolicy):
    """Asks the ledger, says what it decided, and notes the failure beside the checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(None)
        self.config: RunConfig = from_dict(RunConfig, config)
        self._ledger = FailureLedger(self.config.cluster)
        self.last: tuple[Failure, Verdict] | None = None
        self.stopping = False

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        failure = diagnose(training_failed_error)
        verdict = Verdict(False, "the job was being stopped")
        if not self.stopping:
            verdict = self._ledger.judge(failure, self._reached(), time.time())
        self.last = (failure, verdict)
        if failure.kind != "capacity":
            what = "restarting" if verdict.retry else "stopping"
            print(f"{failure.text}; {verdict.why}: {what}", flush=True)
            reason = f"{failure.text} ({verdict.why})"
            self.note("failure", reason=reason, final=not verdict.retry and not self.stopping, **summary(failure))
        return FailureDecision.RETRY if verdict.retry else FailureDecision.RAISE

    def note(self, kind: str, **values: Any) -> None:
        """Best effort: the store may be what has failed."""
        try:
            put_event(self._store(), self.config.name, kind, "controller", **values)
        except StoreError as error:
            print(f"the {kind} could not be noted beside the checkpoints: {error}", flush=True)

    def _reached(self) -> int | None:
        """The highest T that the run has shown; None where the store cannot say."""
        try:
            return read_history(self._store(), self.config.name, MissingObjectError).get("max_tokens", 0)
        except StoreError:
            return None

    def _store(self) -> Any:
        return open_store(self.config.checkpoint.url, attempts=NOTE_ATTEMPTS, timeout_s=NOTE_TIMEOUT_S)


def diagnose(error: Exception) -> Failure:
    """What Ray says about the end of a group, as one failure."""
    if isinstance(error, PreemptionError):
        return Failure("preemption", f"a node with ranks {error.preemption_info.preempted_ranks} was taken away")
    if isinstance(error, WorkerGroupError):
        preempted = any(_is_preempted_actor(each) for each in error.worker_failures.values())
        return Failure.of_ranks(error.worker_failures, preempted)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    words = " ".join(str(cause).split())[:500]
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return Failure("capacity", words)
    if isinstance(cause, WorkerGroupStartupFailedError):
        return Failure("death", f"a worker was lost while the group started: {words}", type(cause).__name__)
    return Failure("internal", f"{type(cause).__name__}: {words}", type(cause).__name__)


class LiveNodes(ElasticScalingPolicy):
    """Ray's reservation is up to 20 s old: leave out nodes that are gone or going, add free ones that have come."""

    _counted: Any = None
    _counted_s = -math.inf

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow only. A group that runs loses a worker by failure or preemption, which its next poll tells as such:
        to shrink it here, seconds before, would call a dead node a resize and wait for it to save."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()
        return decision

    def _get_reserved_resources(self) -> Any:
        # Ray's loop asks without a pause while too few nodes are there.
        if time.monotonic() - self._counted_s >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            self._counted = self._count()
            self._counted_s = time.monotonic()
        else:
            time.sleep(0.1)
        return self._counted

    def _count(self) -> Any:
        reserved = super()._get_reserved_resources()
        if reserved is None:
            return None
        draining = set(ray._private.state.state.get_draining_nodes() or {})
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
        with ThreadPoolExecutor(max(1, min(32, len(nodes)))) as pool:
            there = {node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if answers}
        free = ray._private.state.available_resources_per_node()
        new = {node_id: free[node_id] for node_id in there - reserved.keys() if node_id in free}
        return {node_id: resources for node_id, resources in reserved.items() if node_id in there} | new


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet still takes connections; the head needs seconds longer to find out."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_TIMEOUT_S).close()
        return True
    except OSError:
        return False


class Controller(TrainController):
    """Ray's control loop, plus what the run may be asked to do."""

    _resizing = False

    def _set_state(self, state: Any) -> None:
        self._resizing = isinstance(self.get_state(), ResizingState)
        super()._set_state(state)

    def _execute_resize_decision(self, decision: Any) -> Any:
        group = self.get_worker_group()
        # A group that has failed is still there when its successor is started: nothing to save in that one.
        if group is not None and self._resizing:
            before = len(group.get_workers())
            leave_timeout_s = self._failure_policy.config.cluster.leave_timeout_s
            saved = self._ask(Wish.RESIZE) and self._wait_until_left(leave_timeout_s)
            words = f"resized from {before} to {decision.num_workers} workers" + ("" if saved else ", without saving")
            print(words, flush=True)
            self._failure_policy.note("resize", reason=words)
        return super()._execute_resize_decision(decision)

    async def stop(self) -> bool:
        """Ask the ranks to save and end; False where there are none now."""
        self._failure_policy.stopping = True
        return self._ask(Wish.STOP)

    async def verdict(self) -> tuple[Failure, Verdict] | None:
        """The last failure and what was decided about it."""
        return self._failure_policy.last

    def _ask(self, wish: Wish) -> bool:
        group = self.get_worker_group()
        if group is None:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([worker.execute_async(ask_to_leave, int(wish)) for worker in group.get_workers()], timeout=10)
            return True
        return False

    def _wait_until_left(self, timeout_s: float) -> bool:
        workers = self.get_worker_group().get_workers()
        calls = [worker.execute_async(wait_until_left, timeout_s) for worker in workers]
        with contextlib.suppress(ray.exceptions.RayError):
            return all(ray.get(calls, timeout=timeout_s + 10))
        return False


class Trainer(TorchTrainer):
    """TorchTrainer that runs our controller. `controller` is there while `fit` runs; `verdict` after it."""

    controller: Any = None
    verdict: tuple[Failure, Verdict] | None = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = JudgedFailures(self.train_loop_config)
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = LiveNodes(self.scaling_config)
        variables = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"} | get_env_vars_to_propagate()
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        options = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": variables}}
        self.controller = ray.remote(**options)(Controller).remote(**arguments)
        ray.get(self.controller.run.remote())
        result = ray.get(self.controller.get_result.remote())
        self.verdict = ray.get(self.controller.verdict.remote())
        return result


def stop_wait_s() -> float:
    """Seconds that this cluster gives a stopped job before it is killed."""
    return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3))
