"""What Ray says about the end of a group of workers, as one failure of ours; and Ray's names that we lean on."""

import importlib
import inspect

import pytest
from ray.exceptions import RayTaskError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from nltrain.runtime import controller
from nltrain.runtime.failures import NodeLeaving, RankError
from nltrain.runtime.probe import DeviceRefusedError
from nltrain.runtime.sizes import Sizes


def group(**failures):
    return WorkerGroupError("words", {int(rank[1:]): error for rank, error in failures.items()})


def test_a_lost_process_is_described_by_the_sentence_that_names_the_cause():
    lost = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", RuntimeError("it died"))
    found = controller.diagnose(group(r2=lost))
    assert (found.kind, found.text) == ("death", "rank 2 was lost: it died")


def test_a_ranks_own_error_is_kept_whole():
    found = controller.diagnose(group(r1=RankError(1, "ValueError", "boom", "x.py:3", 512, "the traceback")))
    assert (found.kind, found.tokens, found.traceback) == ("error", 512, "the traceback")


def test_a_node_that_was_drained_counts_as_preemption():
    assert controller.diagnose(group(r0=NodeLeaving("left"))).kind == "preemption"
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [1]})
    assert controller.diagnose(PreemptionError(info, drain_timed_out=True)).kind == "preemption"


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (WorkerGroupStartupTimeoutError(3), "capacity"),
        (WorkerGroupStartupFailedError("a worker died"), "death"),
        (ValueError("a bug of the controller"), "internal"),
    ],
)
def test_troubles_of_the_controller_are_told_apart(cause, kind):
    assert controller.diagnose(ControllerError(cause)).kind == kind


def test_a_driver_that_is_too_old_ends_the_run_in_one_line_before_the_group_is_made(monkeypatch):
    monkeypatch.setattr(controller.torch.version, "cuda", "13.0")
    controller.CheckDriver("cuda", lambda: "580.65.06").after_init_train_context()
    controller.CheckDriver("cpu", lambda: "").after_init_train_context()
    with pytest.raises(
        DeviceRefusedError, match=r"driver 535.1 is too old for torch's CUDA 13.0: install R580"
    ) as error:
        controller.CheckDriver("cuda", lambda: "535.1").after_init_train_context()
    # As it arrives from a worker: Ray's error, with a long account, around ours.
    found = controller.diagnose(ControllerError(RayTaskError("init", "a long account " * 100, error.value)))
    assert found.kind == "internal"
    assert found.text.startswith("DeviceRefusedError: ")
    assert "driver 535.1 is too old" in found.text
    assert "account" not in found.text


@pytest.mark.parametrize(("free", "decided"), [(1, None), (2, None), (3, 3)])
def test_a_running_group_is_grown_but_never_shrunk(free, decided, monkeypatch):
    """A node that has gone is a failure, however soon the count of nodes hears of it."""
    scaling = ScalingConfig(num_workers=(1, 3), elastic_resize_monitor_interval_s=0)
    policy = controller.LiveNodes(scaling)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {f"node {i}": {"CPU": 1.0} for i in range(free)})
    running = WorkerGroupState(start_time=-1e9, placement_group_handle=None, workers=[None, None], sync_actor=None)
    decision = policy.make_decision_for_running_worker_group(running, None)
    assert getattr(decision, "num_workers", None) == decided


def nodes_with(monkeypatch, policy, workers):
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {f"node {i}": {"CPU": 1.0} for i in range(workers)})


def test_workers_that_would_not_make_a_quantum_faster_wait_as_spares(monkeypatch, capsys):
    config = importlib.import_module("jobs.hope_1p3b").config  # 128 sequences, 2 per rank, 32 to 64 workers
    policy = controller.LiveNodes(ScalingConfig(num_workers=(32, 64), elastic_resize_monitor_interval_s=0))
    policy.best = Sizes(config)
    nodes_with(monkeypatch, policy, 63)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 43
    assert "63 workers fit, 43 train and 20 wait as spares: 2 micro-steps" in capsys.readouterr().out
    # Two of the spares are lost, and one of the 43 is replaced: nothing is resized, nothing is said again.
    running = WorkerGroupState(start_time=-1e9, placement_group_handle=None, workers=[None] * 43, sync_actor=None)
    nodes_with(monkeypatch, policy, 60)
    assert isinstance(policy.make_decision_for_running_worker_group(running, None), NoopDecision)
    nodes_with(monkeypatch, policy, 64)
    assert policy.make_decision_for_running_worker_group(running, None).num_workers == 64
    nodes_with(monkeypatch, policy, 31)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


def test_ray_still_has_what_we_override():
    for owner, names in (
        (
            TrainController,
            ("_execute_resize_decision", "_set_state", "_start_worker_group", "get_worker_group", "get_state"),
        ),
        (
            ElasticScalingPolicy,
            (
                "_count_possible_workers",
                "_get_reserved_resources",
                "GET_RESERVED_RESOURCES_INTERVAL_S",
                "make_decision_for_running_worker_group",
            ),
        ),
        (DataParallelTrainer, ("_initialize_and_run_controller", "_create_default_callbacks")),
    ):
        for name in names:
            assert hasattr(owner, name), name
    arguments = inspect.signature(TrainController.__init__).parameters
    assert {"failure_policy", "scaling_policy"} <= set(arguments)
