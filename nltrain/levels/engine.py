"""One level: its shards, its window of gradients, its optimizer step.

The window (window.py) accumulates sums of gradients. At a tick the engine divides them by the window's targets, clips,
decays the masters, makes the optimizer step through DeepSpeed (zero.py), which shards masters and optimizer state and
gathers the new weights, and caps the change. The engine knows neither ZeRO stages nor optimizers: it asks zero.py and
optimizers.py.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nltrain.fragment import Fragment
from nltrain.levels.config import LevelsConfig
from nltrain.levels.groups import arrange
from nltrain.levels.layout import joined, read_parameter
from nltrain.levels.ledger import CONTROL, STATE, Ledger
from nltrain.levels.offload import HostMemory
from nltrain.levels.optimizers import optimizer_of
from nltrain.levels.split import LevelPart
from nltrain.levels.window import ReductionOrder, open_window
from nltrain.levels.zero import shard

NORM_ROW = 4096  # elements added up in fp32 before the sum goes on in fp64


@dataclass(frozen=True)
class Step:
    """What one tick of a level did; `skipped` when its window held a non-finite gradient or no target."""

    skipped: str
    grad_norm: float
    update_ratio: float
    drift: float
    seconds: float


class LevelEngine:
    """One level: its shards, its window of gradients and its optimizer step. Construct on every rank."""

    def __init__(
        self, part: LevelPart, levels: LevelsConfig, device: torch.device, ledger: Ledger, order: ReductionOrder
    ):
        self.config, self.ledger, self.device = part.config, ledger, device
        self.name, self.mode = part.config.name, part.config.mode
        self.num_parameters, self.decay = part.num_parameters, part.describe_decay()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._measure = levels.measure_changes and not self.config.frozen

        originals = {name: parameter.detach().float().cpu() for name, parameter in part.parameters}
        self._optimizer = optimizer_of(self.config)
        self.groups = arrange(part.parameters, levels.bucket_elements, self._optimizer)
        # One group of the optimizer per group: DeepSpeed flattens and shards each by itself, as our window reduces it.
        members = [{"params": list(group.parameters)} for group in self.groups]
        self._zero = shard(part, self.groups, self._optimizer.create(members, self.config, device), levels, ledger)
        self.masters, self.layouts = self._zero.masters, self._zero.layouts
        decayed = [{i for i, name in enumerate(group.names) if name not in part.spared} for group in self.groups]
        self._decayed = [
            joined(layout.spans(self.rank), wanted) for layout, wanted in zip(self.layouts, decayed, strict=True)
        ]
        self._write_masters(originals)
        del originals

        # The state must exist before the first step, because a save may come earlier.
        self._optimizer.create_state(self._zero.optimizer, self.masters, self.config)
        self.initial = [master.detach().clone() for master in self.masters] if self._measure else []
        if self.config.frozen:
            for _, parameter in part.parameters:
                parameter.requires_grad_(False)
        self._window = open_window(part, self.groups, self.layouts, levels, device, ledger, order)
        self.memory = HostMemory(self._sleeping_tensors, device) if self.config.offload else None
        self.sleep()

    def before_forward(self) -> None:
        """Before every forward of a micro-step."""
        self._zero.before_forward()

    def before_backward(self, admitted: Tensor) -> None:
        """Before its backward: whether this rank's part of the micro-step counts (bool on the device)."""
        self._zero.before_backward()
        self._window.begin(admitted)

    def after_backward(self) -> None:
        """After that backward; reductions may still be on their way (`ReductionOrder.complete`)."""
        self._zero.after_backward()
        self._window.finish()

    def step(self, lr: float, decay: float, num_targets: Tensor) -> Step:
        """Mean over the window, clip, optimizer step, gather. `decay` multiplies what decays; one host sync."""
        started_s = time.perf_counter()
        self.wake()
        gradients = self._window.reduce()
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
        self._window.clear()
        self.sleep()
        return Step(skipped, norm, ratio, drift, time.perf_counter() - started_s)

    def _step_masters(self, gradients: list[Tensor], lr: float, decay: float) -> tuple[float, float]:
        cap = self.config.max_relative_change
        before = [master.detach().clone() for master in self.masters] if self._measure or cap is not None else []
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        if decay != 1.0:
            for master, slices in zip(self.masters, self._decayed, strict=True):
                for offset, length in slices:
                    master.data.narrow(0, offset, length).mul_(decay)
        self._zero.step(gradients)
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

    def _states(self) -> dict[str, list[Tensor]]:
        """{name: optimizer state tensor of each group}."""
        state = self._zero.optimizer.state
        return {
            name: [state[master][name] for master in self.masters] for name in self._optimizer.state_names(self.config)
        }

    def _sleeping_tensors(self) -> list[Tensor]:
        """What sleeps between ticks: masters, optimizer state and W_0."""
        return [*self.masters, *(tensor for tensors in self._states().values() for tensor in tensors), *self.initial]

    def device_state_elements(self) -> int:
        """Elements of masters and optimizer state in the optimizer's live buffers now: 0 while the level sleeps."""
        live = [*self.masters, *(tensor for tensors in self._states().values() for tensor in tensors)]
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in live)

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """Views of everything that must survive, wherever it is at the moment; fill them in place to load."""
        kinds = {"master": self.masters, **self._states()}
        if self.initial:
            kinds["initial"] = self.initial
        for kind, tensors in kinds.items():
            for group, layout, tensor in zip(self.groups, self.layouts, tensors, strict=True):
                yield from group.fragments(kind, layout, self.rank, self._resident(tensor))
        yield from self._window.fragments(self.rank)

    def _resident(self, tensor: Tensor) -> Tensor:
        """Where the values of `tensor` are now, on the device or in host memory."""
        return self.memory.resident(tensor) if self.memory is not None else tensor.detach()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, equal on all ranks: the optimizer's step count and what its window holds. A host sync."""
        steps = self._optimizer.steps(self._zero.optimizer, self.masters)
        return {"optimizer_steps": steps, **self._window.state_dict()}

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's sums that no other rank has, {parameter: flat fp32}."""
        return self._window.rank_state()

    def prepare_to_load(self, state: Mapping[str, Any]) -> None:
        """Before `fragments` are filled: they become those that were saved with `state` of `state_dict`."""
        self._window.prepare_to_load(state)

    def load(self, state: Mapping[str, Any], rank_states: Sequence[Mapping[str, Tensor]]) -> None:
        """After the fragments were filled; `rank_states`: those that this rank takes over. A collective."""
        self._optimizer.set_steps(self._zero.optimizer, self.masters, state["optimizer_steps"])
        self.refresh_forward_weights()
        self._window.load(state, rank_states)

    def fold(self) -> None:
        """Reduces the window's local sums into shards. A collective."""
        self._window.fold()

    @property
    def unreduced_bytes(self) -> int:
        """Bytes of this rank's sums that a fold would move into shards; equal on all ranks."""
        return self._window.unreduced_bytes

    def discard_window(self) -> None:
        """Forgets what was accumulated since the last tick."""
        self._window.clear()

    def _write_masters(self, originals: dict[str, Tensor]) -> None:
        """Starts the masters from the weights before they were rounded to bf16, and padding from zero.

        ZeRO-3 leaves padding uninitialised; it would enter the norms.
        """
        for group, layout, master in zip(self.groups, self.layouts, self.masters, strict=True):
            master.data.zero_()
            for index, offset, start, length in layout.spans(self.rank):
                source = originals[group.names[index]].view(-1).narrow(0, start, length)
                master.data.narrow(0, offset, length).copy_(source)

    @torch.no_grad()
    def refresh_forward_weights(self) -> None:
        """Makes the model compute with the masters as they are now."""
        self.wake()
        self._write_forward_weights()
        self.sleep()

    def _write_forward_weights(self) -> None:
        with self.ledger.row(self.name, STATE):
            self._zero.write_forward_weights()

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 master) on rank 0, an empty tensor elsewhere; a collective: iterate on every rank."""
        for group, layout, master in zip(self.groups, self.layouts, self.masters, strict=True):
            mine = self._resident(master).to(self.device)
            full = torch.empty(self.world_size * mine.numel() if self.rank == 0 else 0, device=self.device)
            rows = list(full.view(self.world_size, -1)) if self.rank == 0 else None
            with self.ledger.row(self.name, STATE):
                dist.gather(mine, rows, dst=0)
            for index, name in enumerate(group.names):
                if self.rank == 0:
                    yield name, read_parameter(layout, full, index).view(group.shapes[index])
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
        """Moves masters and optimizer state back to the device; waits for `prefetch`."""
        if self.memory is not None:
            self.memory.wake()

    def close(self) -> None:
        """Removes the hooks on the parameters and releases DeepSpeed's engine."""
        self._window.close()
        self._zero.close()


def sum_of_squares(flat: Tensor) -> Tensor:
    """Float64 sum of squares of a flat fp32 tensor, to 1e-7: one fp32 norm of 10M elements is off by 4e-4 on a CPU."""
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1).double().square().sum()
    return rows + torch.linalg.vector_norm(flat[whole:]).double().square()
