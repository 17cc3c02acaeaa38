"""Ray Train with our own policies. Only this file and local/patience.py use private names of Ray, which is pinned.

Our part: whether a failed group is started again (failures.py), which nodes are no longer used (strikes.py), notes of
both beside the checkpoints, a checkpoint before a resize so that growing costs no tokens, the user's stop with a
checkpoint, and counting only nodes that live and are not drained. Ray's part: placement, restarts, health, elasticity.
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
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from nltrain.config import RunConfig, from_dict
from nltrain.runtime.failures import Failure, FailureLedger, Verdict, summary
from nltrain.runtime.leaving import ask_to_leave, on_sigterm, wait_until_left
from nltrain.runtime.probe import DeviceRefusedError, driver_problem, read_driver
from nltrain.runtime.sizes import Sizes
from nltrain.runtime.strikes import Place, Strikes, note_strike
from nltrain.store import StoreError, open_store
from nltrain.supervision import Wish
from nltrain.track.events import behind, put_event, read_events
from nltrain.track.status import read_history

# A note must not delay a restart: few attempts, a short timeout.
NOTE_ATTEMPTS, NOTE_TIMEOUT_S = 3, 5.0
PROBE_TIMEOUT_S = 3.0
# A rank that died within this time after its watchdog had noted that it is stuck died of that.
STUCK_BEFORE_S = 60.0


def own_rank() -> int:
    """The world rank of this Ray Train worker."""
    return get_train_context().get_world_rank()


def node_is_leaving() -> bool:
    """Whether Ray has informed this worker that a node of its group is drained. No communication.

    The public ray.train.get_preemption_info is a barrier over all workers; our ranks agree in the training loop.
    """
    return get_train_context().preemption_context.preemption_info is not None


def register_with_ray(url: str, metrics: dict[str, Any]) -> None:
    """Report a committed checkpoint of ours to Ray as the run's result. Every rank calls it.

    Ray accepts only files below its own folder, so it gets a small file with the URL, not a second upload.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoint.json").write_text(json.dumps({"url": url}))
        ray.train.report(metrics, ray.train.Checkpoint(folder) if own_rank() == 0 else None)


class SaveOnSigterm(WorkerCallback):
    """Installs the SIGTERM handler where Python allows it: on the main thread of the worker's process."""

    def after_init_train_context(self) -> None:
        """Ray calls it in the worker's process before training."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


class CheckDriver(WorkerCallback):
    """Checks on each rank that the driver runs torch's CUDA, before NCCL fails with a message that does not say so."""

    def __init__(self, device: str, driver: Callable[[], str] = read_driver) -> None:
        self._device, self._driver = device, driver

    def after_init_train_context(self) -> None:
        """Ray calls it in the worker's process before training. Raises DeviceRefusedError."""
        if self._device == "cuda" and (problem := driver_problem(self._driver(), torch.version.cuda)):
            raise DeviceRefusedError(f"{socket.gethostname()}: {problem}")


class JudgedFailures(FailurePolicy):
    """Decides with the FailureLedger, prints the decision, and notes the failure beside the checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(None)
        self.config: RunConfig = from_dict(RunConfig, config)
        self._ledger = FailureLedger(self.config.cluster)
        self.last: tuple[Failure, Verdict] | None = None
        self.stopping = False
        self.places: dict[int, Place] = {}
        self.placed_s = time.time()
        self._strikes: Strikes | None = None
        self._told: set[str] = set()

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """RETRY or RAISE; Ray calls it after each failure."""
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
        if failure.kind == "death" and not self.stopping:
            self._strike(failure)
        return FailureDecision.RETRY if verdict.retry else FailureDecision.RAISE

    def avoided(self) -> dict[str, str]:
        """{Ray's id of a living node: why this run does not use it}."""
        if self._strikes is None:
            cluster = self.config.cluster
            window_s = 3600 * cluster.failure_window_hours
            try:
                self._strikes = Strikes.read(cluster.max_node_strikes, window_s, self._store(), self.config.name)
            except StoreError as error:
                print(f"strikes against nodes could not be read, none counts: {error}", flush=True)
                self._strikes = Strikes(cluster.max_node_strikes, window_s)
        out = self._strikes.out(time.time())
        nodes = [node for node in ray.nodes() if node["Alive"]] if out else []
        found: dict[str, str] = {}
        for node in [node for node in nodes if node["NodeName"] in out]:
            if self._enough([each for each in nodes if each["NodeID"] not in {*found, node["NodeID"]}]):
                found[node["NodeID"]] = node["NodeName"]
            else:
                few = "fewer than cluster.min_workers would be left"
                self._tell(f"node {node['NodeName']} is not left out, for {few}: {out[node['NodeName']]}")
        for node_id, name in found.items():
            self._tell(
                f"node {name} is left out from now on: {out[name]} (cluster.max_node_strikes={self._strikes.limit}); "
                f"to replace it: ray drain-node --node-id={node_id} --reason=DRAIN_NODE_REASON_PREEMPTION "
                f"--reason-message=strikes --deadline-remaining-seconds=60"
            )
        return {node_id: out[name] for node_id, name in found.items()}

    def _strike(self, failure: Failure) -> None:
        """Count the failure against the node of the rank that caused it, where that is one node."""
        ranks = failure.ranks
        try:
            # The rank is dead: its watchdog's note of the hang may still come, its note of being stuck is there.
            since_s = max(self.placed_s, time.time() - STUCK_BEFORE_S)
            events = read_events(self._store(), self.config.name, since_s=since_s, kinds=("hang", "stuck"))
            hang = behind(events, killed=True)
        except StoreError as error:
            print(f"whether this was a hang could not be read, lost ranks are taken for the cause: {error}", flush=True)
            hang = None
        if hang is not None:
            ranks = (hang["rank"],)
        places = [self.places[rank] for rank in ranks if rank in self.places]
        if len({place.node_id for place in places}) != 1:
            return
        before = self.avoided()
        assert self._strikes is not None
        text = f"rank {ranks[0]} hung" if hang is not None else failure.text
        strike = self._strikes.add(places[0], text, failure.bad_device, time.time())
        count = self._strikes.count(strike.node, time.time())
        if self._strikes.limit:
            gpu = f", GPU {strike.gpu}" if strike.gpu else ""
            print(f"strike {count} of {self._strikes.limit} against node {strike.node}{gpu}", flush=True)
            try:
                note_strike(self._store(), self.config.name, strike)
            except StoreError as error:
                print(f"the strike could not be noted beside the checkpoints: {error}", flush=True)
        if self.avoided().keys() - before.keys():
            self._ledger.cause_removed()

    def _enough(self, nodes: list[dict[str, Any]]) -> bool:
        """Whether these nodes have room for the smallest number of ranks of the run."""
        cluster = self.config.cluster
        each = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.device == "cuda" else {})
        places = sum(
            int(min(node["Resources"].get(name, 0.0) // size for name, size in each.items())) for node in nodes
        )
        return places >= (cluster.min_workers or cluster.max_workers)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            print(text, flush=True)

    def note(self, kind: str, **values: Any) -> None:
        """Write an event beside the checkpoints. Best effort: the failure may be that of the store."""
        try:
            put_event(self._store(), self.config.name, kind, "controller", **values)
        except StoreError as error:
            print(f"the {kind} could not be noted beside the checkpoints: {error}", flush=True)

    def _reached(self) -> int | None:
        """The highest T that the run has shown; None where the store cannot say."""
        try:
            return read_history(self._store(), self.config.name).get("max_tokens", 0)
        except StoreError:
            return None

    def _store(self) -> Any:
        return open_store(self.config.checkpoint.url, attempts=NOTE_ATTEMPTS, timeout_s=NOTE_TIMEOUT_S)


def diagnose(error: Exception) -> Failure:
    """Ray's error about the end of a group, as one Failure."""
    if isinstance(error, PreemptionError):
        return Failure("preemption", f"a node with ranks {error.preemption_info.preempted_ranks} was taken away")
    if isinstance(error, WorkerGroupError):
        preempted = any(_is_preempted_actor(each) for each in error.worker_failures.values())
        return Failure.of_ranks(error.worker_failures, preempted)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
        cause = cause.cause  # what a worker raised, without Ray's text around it
    words = " ".join(str(cause).split())[:500]
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return Failure("capacity", words)
    if isinstance(cause, WorkerGroupStartupFailedError):
        return Failure("death", f"a worker was lost while the group started: {words}", type(cause).__name__)
    return Failure("internal", f"{type(cause).__name__}: {words}", type(cause).__name__)


class LiveNodes(ElasticScalingPolicy):
    """Corrects Ray's count of nodes, which is up to 20 s old: leaves out lost and drained nodes, adds new free ones."""

    best: Callable[[int], int] = staticmethod(int)
    """How many of so many available workers shall train."""
    avoided: Callable[[], Collection[str]] = staticmethod(tuple)
    """Ray's ids of the nodes that the run does not use."""
    _counted: Any = None
    _counted_s = -math.inf

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow only. The next poll finds a lost worker as a failure or a preemption; to shrink the group here, seconds
        earlier, would count a dead node as a resize and wait for its rank to save."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return NoopDecision()
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return self.best(super()._count_possible_workers(reserved_resources))

    def _get_reserved_resources(self) -> Any:
        # Ray's loop calls this without a pause while there are too few nodes.
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
        left_out = draining | set(self.avoided())
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]
        with ThreadPoolExecutor(max(1, min(32, len(nodes)))) as pool:
            there = {node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if answers}
        free = ray._private.state.available_resources_per_node()
        new = {node_id: free[node_id] for node_id in there - reserved.keys() if node_id in free}
        return {node_id: resources for node_id, resources in reserved.items() if node_id in there} | new


def _answers(node: dict[str, Any]) -> bool:
    """Whether the node's raylet accepts connections; the head notices a lost raylet seconds later."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_TIMEOUT_S).close()
        return True
    except OSError:
        return False


class AvoidNodes(ControllerCallback):
    """Keeps ranks away from the avoided nodes, each time a group is started."""

    def __init__(self, policy: JudgedFailures) -> None:
        self._policy = policy

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """The label selector for the group's workers; None: every node may be used."""
        avoided = self._policy.avoided()
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({','.join(sorted(avoided))})"} if avoided else None


class Controller(TrainController):
    """Ray's control loop, with a save before each resize and calls to stop the run and to read the verdict."""

    _resizing = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._controller_callbacks.append(AvoidNodes(self._failure_policy))
        if isinstance(self._scaling_policy, LiveNodes):
            self._scaling_policy.avoided = self._failure_policy.avoided

    def _start_worker_group(self, *arguments: Any, **named: Any) -> None:
        policy = self._failure_policy
        policy.places, policy.placed_s = {}, time.time()
        super()._start_worker_group(*arguments, **named)
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
        for worker in self.get_worker_group().get_workers():
            at = worker.metadata
            place = Place(at.node_id, names.get(at.node_id, at.node_ip), ",".join(map(str, at.gpu_ids)))
            policy.places[worker.distributed_context.world_rank] = place

    def _set_state(self, state: Any) -> None:
        self._resizing = isinstance(self.get_state(), ResizingState)
        super()._set_state(state)

    def _execute_resize_decision(self, decision: Any) -> Any:
        group = self.get_worker_group()
        # A group that has failed still exists when the next one is started, but has nothing to save.
        if group is not None and self._resizing:
            before = len(group.get_workers())
            leave_timeout_s = self._failure_policy.config.cluster.leave_timeout_s
            saved = self._ask(Wish.RESIZE) and self._wait_until_left(leave_timeout_s)
            words = f"resized from {before} to {decision.num_workers} workers" + ("" if saved else ", without saving")
            print(words, flush=True)
            self._failure_policy.note("resize", reason=words)
        return super()._execute_resize_decision(decision)

    async def stop(self, left_s: float) -> bool:
        """Ask the ranks to save and end within `left_s`; False where there are none now."""
        self._failure_policy.stopping = True
        return self._ask(Wish.STOP, left_s)

    async def verdict(self) -> tuple[Failure, Verdict] | None:
        """The last failure and what was decided about it."""
        return self._failure_policy.last

    def _ask(self, wish: Wish, left_s: float = math.inf) -> bool:
        group = self.get_worker_group()
        if group is None:
            return False
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(
                [worker.execute_async(ask_to_leave, int(wish), left_s) for worker in group.get_workers()], timeout=10
            )
            return True
        return False

    def _wait_until_left(self, timeout_s: float) -> bool:
        workers = self.get_worker_group().get_workers()
        calls = [worker.execute_async(wait_until_left, timeout_s) for worker in workers]
        with contextlib.suppress(ray.exceptions.RayError):
            return all(ray.get(calls, timeout=timeout_s + 10))
        return False


class Trainer(TorchTrainer):
    """TorchTrainer that runs our controller. `controller` is set while `fit` runs, `verdict` after it."""

    controller: Any = None
    verdict: tuple[Failure, Verdict] | None = None

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's callbacks without that of Ray Data, which we do not use: it starts a process for each group."""
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = JudgedFailures(self.train_loop_config)
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = LiveNodes(self.scaling_config)
            arguments["scaling_policy"].best = Sizes(from_dict(RunConfig, self.train_loop_config))
        # The actors that Ray's controller starts look for their cluster by its address; without one they search the
        # machine's processes, and fail where those of two clusters run.
        variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        variables |= get_env_vars_to_propagate()
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
