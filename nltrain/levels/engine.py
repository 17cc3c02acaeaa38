"""One level over DeepSpeed ZeRO: the only file that knows deepspeed's private names.

DeepSpeed shards the level's masters and optimizer state, makes every optimizer step on them and gathers the new
weights; at ZeRO-3 it also gathers and releases weights around each module. The gradients are ours (window.py):
DeepSpeed's own gradient hooks are removed, and at a tick the mean over the window is handed to its step. Reasons: its
accumulators average instead of summing, differ per stage and dtype, and reduce before a bad micro-step can be left
out. A parity test per stage and dtype guards every private call below (written for deepspeed 0.19.8).
"""

import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nltrain.fragment import Fragment
from nltrain.levels.config import LevelsConfig, LevelsError
from nltrain.levels.layout import FlatLayout, Layout, RowLayout, joined, read_parameter
from nltrain.levels.ledger import CONTROL, STATE, WEIGHTS, Ledger
from nltrain.levels.offload import HostMemory
from nltrain.levels.plan import LevelPart
from nltrain.levels.window import GradientWindow, LocalWindow, ReductionOrder, ShardedWindow

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import deepspeed
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

MODES = {1: "local", 2: "sharded", 3: "gathered"}
NORM_ROW = 4096  # elements added up in fp32 before the sum goes on in fp64
MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


@dataclass(frozen=True)
class Step:
    """What one tick of a level did; `skipped` when its window held a non-finite gradient or no target."""

    skipped: str
    grad_norm: float
    update_ratio: float
    drift: float
    seconds: float


class _Holder(nn.Module):
    """Gives DeepSpeed a module around parameters that live elsewhere; never called."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(f"p{index}", parameter)


def _leave_out_what_no_level_uses() -> None:
    """Two things that DeepSpeed does at every start, and so at every restart of a group.

    It imports its Muon to see whether an optimizer is one, which sets up torch's compiler: over a second. And on CPU it
    loads a shared-memory all-reduce for inference, built by a C++ compiler at the first start, under a lock that a
    killed process leaves behind and the next one waits for.
    """
    if MUON not in sys.modules:
        with mock.patch.object(deepspeed.runtime.compiler, "compile", lambda *_, **__: lambda function: function):
            importlib.import_module(MUON)
    # Not deepspeed.comm.torch: that name is torch itself by now.
    setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010


def init_deepspeed(device: torch.device) -> None:
    """Attaches deepspeed to the process group that is already there; it takes the device from LOCAL_RANK."""
    if not dist.is_initialized():
        raise LevelsError(
            "no torch.distributed process group: call torch.distributed.init_process_group before the levels"
        )
    _leave_out_what_no_level_uses()
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)


class LevelEngine:
    """One level: its shards, its window of gradients and its optimizer step."""

    def __init__(
        self, part: LevelPart, levels: LevelsConfig, device: torch.device, ledger: Ledger, order: ReductionOrder
    ):
        self.config, self.ledger, self.device = part.config, ledger, device
        self.name, self.stage = part.config.name, part.config.zero_stage
        self.mode = MODES[self.stage]
        self.names = [name for name, _ in part.parameters]
        self.num_parameters, self.decay = part.num_parameters, part.describe_decay()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._measure = levels.measure_changes and not self.config.frozen
        self._shapes = {name: parameter.shape for name, parameter in part.parameters}

        originals = {name: parameter.detach().float().cpu() for name, parameter in part.parameters}
        groups = _group(part.parameters, levels.bucket_elements)
        self.group_names = [[name for name, _ in group] for group in groups]
        self._zero = self._initialize(part, groups, levels)
        self.masters: list[Tensor] = list(
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        self.layouts = [self._layout(group, master) for group, master in zip(groups, self.masters, strict=True)]
        self._pieces = [layout.pieces(self.rank) for layout in self.layouts]
        decayed = [{i for i, name in enumerate(names) if name not in part.spared} for names in self.group_names]
        self._decayed = [joined(pieces, wanted) for pieces, wanted in zip(self._pieces, decayed, strict=True)]
        self._write_masters(originals)
        del originals

        self.state_keys = self._create_optimizer_state()
        self.initial = [master.detach().clone() for master in self.masters] if self._measure else []
        self.window: GradientWindow | None = None
        if self.config.frozen:
            for _, parameter in part.parameters:
                parameter.requires_grad_(False)
        else:
            reduce_dtype = torch.bfloat16 if levels.reduce_dtype_of(part.config) == "bf16" else torch.float32
            tensors = [[parameter for _, parameter in group] for group in groups]
            what = (self.name, tensors, self.layouts, reduce_dtype, device, ledger)
            places = [part.places[names[0]] for names in self.group_names]
            self.window = LocalWindow(*what) if self.stage == 1 else ShardedWindow(*what, order=order, places=places)
        self.memory = HostMemory(self._sleeping_tensors, device) if self.config.offload else None
        self.sleep()

    def _initialize(self, part: LevelPart, groups: list[list[tuple[str, nn.Parameter]]], levels: LevelsConfig) -> Any:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0,  # its default is 1.0; we clip the mean ourselves
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": False,
                "reduce_bucket_size": 1_000_000,  # would be allocated although our window does the reducing
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,  # released right after use
                "stage3_prefetch_bucket_size": levels.prefetch_elements,
                **({} if self.stage == 3 else {"compute_grad_norm": False}),
            },
        }
        if levels.dtype == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # One parameter group per bucket: DeepSpeed flattens and shards each by itself, which is what our window
        # reduces.
        optimizer = self._optimizer([{"params": [parameter for _, parameter in group]} for group in groups])
        module = nn.ModuleList(part.modules) if self.stage == 3 else _Holder([p for _, p in part.parameters])
        level = deepspeed.utils.logger.level
        deepspeed.utils.logger.setLevel(logging.ERROR)  # warns of torch's own optimizers as untested, once per level
        try:
            with self.ledger.row(self.name, STATE):
                engine, *_ = deepspeed.initialize(
                    model=module, optimizer=optimizer, config=config, dist_init_required=False
                )
        finally:
            deepspeed.utils.logger.setLevel(level)
        zero = engine.optimizer
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        if self.stage == 3:
            # Its gradient partitions: ours live in the window.
            zero.grad_partitions_flat_buffer = None
            zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
            self._label_gathers(zero._get_param_coordinator())
        else:
            # Views that would keep a sleeping level's masters in device memory.
            for _, parameter in part.parameters:
                setattr(parameter, "_hp_mapping", None)  # noqa: B010 - an attribute deepspeed adds
            zero._hp_optimizer_states_linked = True
        self._engine, self._module = engine, module
        return zero

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "sgd" or config.frozen:
            momentum = 0.0 if config.frozen else config.momentum
            return torch.optim.SGD(groups, lr=config.lr, momentum=momentum)
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused
        )

    def _create_optimizer_state(self) -> tuple[str, ...]:
        """Makes the state exist before the first step, as the optimizer would start it: saves need its tensors."""
        optimizer = self._zero.optimizer
        keys: tuple[str, ...] = ()
        for master in self.masters:
            if isinstance(optimizer, torch.optim.AdamW):
                keys = ("exp_avg", "exp_avg_sq")
                on_device = master.device if optimizer.defaults["fused"] else torch.device("cpu")
                optimizer.state[master]["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
            elif optimizer.defaults["momentum"]:
                keys = ("momentum_buffer",)
            for key in keys:
                optimizer.state[master][key] = torch.zeros_like(master.detach())
        return keys

    def _layout(self, group: list[tuple[str, nn.Parameter]], master: Tensor) -> Layout:
        numels = [self._shapes[name].numel() for name, _ in group]
        if self.stage < 3:
            return FlatLayout(numels, self.world_size, master.numel())
        layout = RowLayout(numels, self.world_size)
        chunks = [getattr(parameter, "ds_tensor").ds_numel for _, parameter in group]  # noqa: B009 - deepspeed's
        if chunks != layout.chunks or layout.shard_numel != master.numel():
            raise LevelsError(
                f"level {self.name!r}: this deepspeed partitions ZeRO-3 parameters differently, use 0.19.8"
            )
        return layout

    def _label_gathers(self, coordinator: Any) -> None:
        fetch: Callable[..., Any] = coordinator.fetch_sub_module

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self.ledger.row(self.name, WEIGHTS):
                return fetch(*args, **kwargs)

        coordinator.fetch_sub_module = labelled

    def before_forward(self) -> None:
        if self.stage == 3:
            with self.ledger.row(self.name, CONTROL):
                self._zero._get_param_coordinator().reset_step()
            self._discover_external_parameters(True)

    def before_backward(self, admitted: Tensor) -> None:
        if self.stage == 3:
            self._discover_external_parameters(False)
        if self.window is not None:
            self.window.begin(admitted)

    def after_backward(self) -> None:
        if self.stage == 3:
            self._zero.backward_epilogue()
        if self.window is not None:
            self.window.finish()

    def _discover_external_parameters(self, on: bool) -> None:
        """Lets ZeRO-3 gather a parameter that a parent's forward reads directly from its child."""
        for module in self._module.modules():
            setattr(module._parameters, "_in_forward", on)  # noqa: B010 - an attribute of deepspeed's dict

    def step(self, lr: float, decay: float, num_targets: Tensor) -> Step:
        """Mean over the window, clip, optimizer step, gather. `decay` multiplies what decays; one host sync."""
        assert self.window is not None
        started_s = time.perf_counter()
        self.wake()
        gradients = self.window.reduce()
        for gradient in gradients:
            gradient.div_(num_targets.clamp(min=1))
        squares = torch.stack([sum_of_squares(gradient) for gradient in gradients]).sum()
        with self.ledger.row(self.name, CONTROL):
            dist.all_reduce(squares)
        norm, targets = torch.stack([squares.sqrt(), num_targets]).tolist()
        skipped = "no targets" if not targets else "" if math.isfinite(norm) else "gradient not finite"
        ratio, drift = 0.0, math.nan
        if not skipped:
            if self.config.clip_norm is not None and norm > self.config.clip_norm:
                for gradient in gradients:
                    gradient.mul_(self.config.clip_norm / (norm + 1e-6))
            ratio, drift = self._step_masters(gradients, lr, decay)
        self.window.clear()
        self.sleep()
        return Step(skipped, norm, ratio, drift, time.perf_counter() - started_s)

    def _step_masters(self, gradients: list[Tensor], lr: float, decay: float) -> tuple[float, float]:
        optimizer, cap = self._zero.optimizer, self.config.max_relative_change
        before = [master.detach().clone() for master in self.masters] if self._measure or cap is not None else []
        for group in optimizer.param_groups:
            group["lr"] = lr
        if decay != 1.0:
            for master, slices in zip(self.masters, self._decayed, strict=True):
                for offset, length in slices:
                    master.data.narrow(0, offset, length).mul_(decay)
        self._zero.averaged_gradients = {
            i: [gradient] if self.stage == 3 else GradPartitionBufferGroup([gradient], gradient)
            for i, gradient in enumerate(gradients)
        }
        # At ZeRO-3 the step gathers nothing: what it reduces is one norm per group.
        with self.ledger.row(self.name, CONTROL if self.stage == 3 else WEIGHTS):
            self._zero.step()
        self.ledger.optimizer_elements[self.name] = self.ledger.optimizer_elements.get(self.name, 0) + sum(
            master.numel() for master in self.masters
        )
        if not before:
            return math.nan, math.nan
        change, size, drift, start = self._norms(before)
        ratio = change / size if size else math.nan
        if cap is not None and ratio > cap:
            for master, old in zip(self.masters, before, strict=True):
                master.data.copy_(torch.lerp(old, master.data, cap / ratio))
            self._write_forward_weights()
            _, _, drift, start = self._norms(before)
            ratio = cap
        return ratio, drift / start if start else math.nan

    def _norms(self, before: list[Tensor]) -> list[float]:
        """||W - before||, ||before||, ||W - W_0||, ||W_0|| over all ranks. A host sync."""
        first = self.initial or before
        rows = []
        for master, old, start in zip(self.masters, before, first, strict=True):
            new = master.detach()
            rows.append(torch.stack([sum_of_squares(x) for x in (new - old, old, new - start, start)]))
        squares = torch.stack(rows).sum(0)
        with self.ledger.row(self.name, CONTROL):
            dist.all_reduce(squares)
        return squares.sqrt().tolist()

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer counts for its bias correction."""
        state = self._zero.optimizer.state
        return int(state[self.masters[0]]["step"].item()) if "exp_avg" in self.state_keys else 0

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        if "exp_avg" in self.state_keys:
            for master in self.masters:
                self._zero.optimizer.state[master]["step"].fill_(float(steps))

    def _sleeping_tensors(self) -> list[Tensor]:
        """What sleeps between ticks: masters, optimizer state and W_0."""
        states = [self._zero.optimizer.state[master][key] for master in self.masters for key in self.state_keys]
        return [*self.masters, *states, *self.initial]

    def device_state_elements(self) -> int:
        """Elements of masters and optimizer state in the optimizer's live buffers now: 0 while the level sleeps."""
        states = self._zero.optimizer.state
        live = [*self.masters, *(states[master][key] for master in self.masters for key in self.state_keys)]
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in live)

    def fragments(self, with_window: bool) -> Iterator[tuple[str, Fragment]]:
        """Views of everything that must survive, wherever it is at the moment; fill them in place to load."""
        kinds: dict[str, list[Tensor]] = {"master": self.masters}
        for key in self.state_keys:
            kinds[key] = [self._zero.optimizer.state[master][key] for master in self.masters]
        if self.initial:
            kinds["initial"] = self.initial
        if with_window and self.window is not None:
            kinds["window"] = self.window.shards
        for kind, tensors in kinds.items():
            for names, pieces, tensor in zip(self.group_names, self._pieces, tensors, strict=True):
                flat = self.memory.resident(tensor) if self.memory is not None else tensor.detach()
                for index, offset, start, length in pieces:
                    name = names[index]
                    view = flat.narrow(0, offset, length)
                    yield f"{name}.{kind}", Fragment(view, start, self._shapes[name].numel())

    def _write_masters(self, originals: dict[str, Tensor]) -> None:
        """Starts the masters from the weights before they were rounded to bf16, and padding from zero.

        ZeRO-3 leaves padding uninitialised; it would enter the norms.
        """
        for names, pieces, master in zip(self.group_names, self._pieces, self.masters, strict=True):
            master.data.zero_()
            for index, offset, start, length in pieces:
                source = originals[names[index]].view(-1).narrow(0, start, length)
                master.data.narrow(0, offset, length).copy_(source)

    @torch.no_grad()
    def refresh_forward_weights(self) -> None:
        """Makes the model compute with the masters as they are now."""
        self.wake()
        self._write_forward_weights()
        self.sleep()

    def _write_forward_weights(self) -> None:
        with self.ledger.row(self.name, STATE):
            if self.stage < 3:
                self._zero.update_lp_params()
            else:
                self._zero._partition_all_parameters()
                for index, master in enumerate(self.masters):
                    self._zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
                    self._zero._unflatten_partitioned_parameters(index)

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 master) on rank 0, an empty tensor elsewhere; a collective: iterate on every rank."""
        for names, layout, master in zip(self.group_names, self.layouts, self.masters, strict=True):
            shard = self.memory.resident(master) if self.memory is not None else master.detach()
            shard = shard.to(self.device)
            full = torch.empty(self.world_size * shard.numel() if self.rank == 0 else 0, device=self.device)
            rows = list(full.view(self.world_size, -1)) if self.rank == 0 else None
            with self.ledger.row(self.name, STATE):
                dist.gather(shard, rows, dst=0)
            for index, name in enumerate(names):
                if self.rank == 0:
                    yield name, read_parameter(layout, full, index).view(self._shapes[name])
                else:
                    yield name, full

    def sleep(self) -> None:
        """Moves masters and optimizer state to host memory, when the level is configured to."""
        if self.memory is not None:
            self.memory.sleep()

    def prefetch(self) -> None:
        """Starts the way back from host memory; `step` waits for it."""
        if self.memory is not None:
            self.memory.prefetch()

    def wake(self) -> None:
        if self.memory is not None:
            self.memory.wake()

    def close(self) -> None:
        if self.window is not None:
            self.window.close()
        self._engine.destroy()


def sum_of_squares(flat: Tensor) -> Tensor:
    """Float64 sum of squares of a flat fp32 tensor, to 1e-7: one fp32 norm of 10M elements is off by 4e-4 on a CPU."""
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1).double().square().sum()
    return rows + torch.linalg.vector_norm(flat[whole:]).double().square()


def _group(parameters: Sequence[tuple[str, nn.Parameter]], limit: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters together up to `limit` elements; a larger one by itself."""
    groups: list[list[tuple[str, nn.Parameter]]] = []
    size = limit
    for name, parameter in parameters:
        if size + parameter.numel() > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += parameter.numel()
    return groups
