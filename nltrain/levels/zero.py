"""The groups of one level on DeepSpeed ZeRO: the only file that knows deepspeed's private names.

DeepSpeed shards the fp32 masters of a level and its optimizer state, makes every optimizer step on them and gathers the
new weights; at ZeRO-3 it also gathers and releases weights around each module. Gradients never enter its own path: its
hooks are removed, and `step` takes the averaged gradients from the caller. Written for deepspeed 0.19.8; a parity test
per stage and dtype guards every private call. ZeRO 1 and 2 differ for DeepSpeed only in what our window does
(`window.py`), so that one adapter serves both.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nltrain.levels.config import LevelsConfig, LevelsError
from nltrain.levels.groups import Group
from nltrain.levels.layout import FlatLayout, Layout, RowLayout
from nltrain.levels.ledger import CONTROL, STATE, WEIGHTS, Ledger
from nltrain.levels.split import LevelPart

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from deepspeed.utils import nvtx

# Ranges for NVIDIA's profiler, entered around every hook of ZeRO-3; without a GPU nobody reads them.
nvtx.enable_nvtx = torch.cuda.is_available()

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


class ZeroAdapter(Protocol):
    """What a level needs of DeepSpeed. Every method but `close` is called on all ranks in the same order."""

    optimizer: torch.optim.Optimizer
    """the optimizer that was given, now over the masters: its state is keyed by them"""
    masters: list[Tensor]
    """this rank's shard of the fp32 weights of each group, flat"""
    layouts: list[Layout]
    """of each group: what lies where in the shards"""

    def before_forward(self) -> None:
        """Before every forward of a micro-step."""
        ...

    def before_backward(self) -> None:
        """After that forward, before its backward."""
        ...

    def after_backward(self) -> None:
        """After every backward, before gradients are summed over ranks."""
        ...

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One optimizer step with the averaged gradient of each master, then the new weights on all ranks."""
        ...

    def write_forward_weights(self) -> None:
        """Makes the model compute with the masters as they are. A collective."""
        ...

    def close(self) -> None:
        """Releases DeepSpeed's engine."""
        ...


def init_deepspeed(device: torch.device) -> None:
    """Attaches deepspeed to the process group that exists; DeepSpeed takes the device from LOCAL_RANK."""
    if not dist.is_initialized():
        raise LevelsError(
            "no torch.distributed process group: call torch.distributed.init_process_group before the levels"
        )
    _leave_out_what_no_level_uses()
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


def shard(
    part: LevelPart, groups: Sequence[Group], optimizer: torch.optim.Optimizer, levels: LevelsConfig, ledger: Ledger
) -> ZeroAdapter:
    """Gives the parameters of a level to DeepSpeed at the level's ZeRO stage. `optimizer` has one group per group."""
    adapter = ZeroThreeAdapter if part.config.zero_stage == 3 else ZeroOneTwoAdapter
    return adapter(part, groups, optimizer, levels, ledger)


class _Adapter:
    """What both adapters share: one DeepSpeed engine without its gradient hooks."""

    def __init__(
        self,
        part: LevelPart,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        levels: LevelsConfig,
        ledger: Ledger,
        settings: dict[str, Any],
    ):
        self._name, self._ledger = part.config.name, ledger
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0,  # its default is 1.0; we clip the mean ourselves
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": part.config.zero_stage,
                "contiguous_gradients": False,
                "reduce_bucket_size": 1_000_000,  # would be allocated although our window does the reducing
                "overlap_comm": False,
                **settings,
            },
        }
        if levels.dtype == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # DeepSpeed warns once per level that torch's own optimizers are untested.
        with _quiet(), ledger.row(self._name, STATE):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._zero: Any = self._engine.optimizer
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._zero._grad_acc_hooks.clear()
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer

    def close(self) -> None:
        """Releases DeepSpeed's engine."""
        self._engine.destroy()


class ZeroOneTwoAdapter(_Adapter):
    """ZeRO 1 and 2: whole weights on every rank, flat groups cut into equal shards of masters and state."""

    def __init__(
        self,
        part: LevelPart,
        groups: Sequence[Group],
        optimizer: torch.optim.Optimizer,
        levels: LevelsConfig,
        ledger: Ledger,
    ):
        parameters = [parameter for group in groups for parameter in group.parameters]
        super().__init__(part, _Holder(parameters), optimizer, levels, ledger, {"compute_grad_norm": False})
        # Views that would keep a sleeping level's masters in device memory.
        for parameter in parameters:
            setattr(parameter, "_hp_mapping", None)  # noqa: B010 - an attribute deepspeed adds
        self._zero._hp_optimizer_states_linked = True
        self.masters: list[Tensor] = list(self._zero.single_partition_of_fp32_groups)
        world_size = dist.get_world_size()
        self.layouts: list[Layout] = [
            FlatLayout(group.numels, world_size, master.numel())
            for group, master in zip(groups, self.masters, strict=True)
        ]

    def before_forward(self) -> None:
        """Nothing: the weights are whole."""

    def before_backward(self) -> None:
        """Nothing: the weights are whole."""

    def after_backward(self) -> None:
        """Nothing: DeepSpeed took no part in backward."""

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One optimizer step on this rank's shards, then an all-gather of the weights."""
        self._zero.averaged_gradients = {
            index: GradPartitionBufferGroup([gradient], gradient) for index, gradient in enumerate(gradients)
        }
        with self._ledger.row(self._name, WEIGHTS):
            self._zero.step()

    def write_forward_weights(self) -> None:
        """Rounds the masters to the weights' dtype and all-gathers them."""
        self._zero.update_lp_params()


class ZeroThreeAdapter(_Adapter):
    """ZeRO 3: weights are sharded too, every parameter by itself, and gathered around each module that uses them."""

    def __init__(
        self,
        part: LevelPart,
        groups: Sequence[Group],
        optimizer: torch.optim.Optimizer,
        levels: LevelsConfig,
        ledger: Ledger,
    ):
        self._module = nn.ModuleList(part.modules)
        settings = {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,  # released right after use
            "stage3_prefetch_bucket_size": levels.prefetch_elements,
        }
        super().__init__(part, self._module, optimizer, levels, ledger, settings)
        # Its gradient partitions: ours live in the window.
        self._zero.grad_partitions_flat_buffer = None
        self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        self._label_gathers(self._zero._get_param_coordinator())
        self.masters: list[Tensor] = list(self._zero.fp32_partitioned_groups_flat)
        self.layouts: list[Layout] = [
            self._layout(group, master) for group, master in zip(groups, self.masters, strict=True)
        ]

    def _layout(self, group: Group, master: Tensor) -> Layout:
        layout = RowLayout(group.numels, dist.get_world_size())
        chunks = [getattr(parameter, "ds_tensor").ds_numel for parameter in group.parameters]  # noqa: B009
        if chunks != layout.chunks or layout.shard_numel != master.numel():
            raise LevelsError(
                f"level {self._name!r}: this deepspeed partitions ZeRO-3 parameters differently, use 0.19.8"
            )
        return layout

    def _label_gathers(self, coordinator: Any) -> None:
        fetch: Callable[..., Any] = coordinator.fetch_sub_module

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self._ledger.row(self._name, WEIGHTS):
                return fetch(*args, **kwargs)

        coordinator.fetch_sub_module = labelled

    def before_forward(self) -> None:
        """Restarts DeepSpeed's trace of modules, which otherwise grows with every evaluation."""
        with self._ledger.row(self._name, CONTROL):
            self._zero._get_param_coordinator().reset_step()
        self._discover_external_parameters(True)

    def before_backward(self) -> None:
        """Ends the search for parameters that a parent reads."""
        self._discover_external_parameters(False)

    def after_backward(self) -> None:
        """Releases what backward gathered."""
        self._zero.backward_epilogue()

    def _discover_external_parameters(self, on: bool) -> None:
        """Lets ZeRO-3 gather a parameter that a parent's forward reads directly from its child."""
        for module in self._module.modules():
            setattr(module._parameters, "_in_forward", on)  # noqa: B010 - an attribute of deepspeed's dict

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One optimizer step on this rank's shards; weights are gathered by the modules that use them."""
        self._zero.averaged_gradients = {index: [gradient] for index, gradient in enumerate(gradients)}
        # What this step reduces is one norm per group.
        with self._ledger.row(self._name, CONTROL):
            self._zero.step()

    def write_forward_weights(self) -> None:
        """Rounds the masters to the weights' dtype, shard by shard."""
        self._zero._partition_all_parameters()
        for index, master in enumerate(self.masters):
            self._zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
            self._zero._unflatten_partitioned_parameters(index)


class _Holder(nn.Module):
    """Gives DeepSpeed a module around parameters that live elsewhere; never called."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(f"p{index}", parameter)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs errors only."""
    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeed.utils.logger.setLevel(level)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside, and what it was before afterwards."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _leave_out_what_no_level_uses() -> None:
    """Skips two things that DeepSpeed does at every start, and so at every restart of a group.

    DeepSpeed imports its Muon to see whether an optimizer is one, which sets up torch's compiler: over a second. On CPU
    it also loads a shared-memory all-reduce for inference. A C++ compiler builds it at the first start, under a lock
    that a killed process leaves behind and that the next process waits for.
    """
    if MUON not in sys.modules:
        with _replaced(deepspeed.runtime.compiler, "compile", lambda *_, **__: lambda function: function):
            importlib.import_module(MUON)
    # Not deepspeed.comm.torch: that name is torch itself by now.
    setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010
