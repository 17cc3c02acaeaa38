"""LevelScheduler: one backward, every level accumulates, due levels tick on the token clock.

    scheduler.start_micro_step()
    loss_sum = model.loss(...)                       # sum over real targets on this rank
    scheduler.backward(loss_sum, num_targets)
    ...                                              # the other micro-steps of the quantum
    ticks = scheduler.finish_quantum()               # T += quantum

Guarantees: training equals dense training with one plain optimizer per level that is given the mean gradient per target
of the level's window. This holds for every world size, every cut into micro-steps and every mix of ZeRO stages, up to
the order of summation. By T every level has ticked exactly floor((T + phase) / period) times, and
`done + skipped == due` always. Limits: fp32 and bf16; the optimizers of optimizers.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nltrain.errors import UserError
from nltrain.fragment import Fragment
from nltrain.levels.clock import TokenClock, staggered_phases
from nltrain.levels.config import LevelsConfig, LevelsError
from nltrain.levels.engine import LevelEngine
from nltrain.levels.guard import LossGuard, MicroStep
from nltrain.levels.ledger import STATE, Ledger
from nltrain.levels.split import split_levels
from nltrain.levels.window import ReductionOrder
from nltrain.levels.zero import init_deepspeed


class TrainingStopped(UserError, RuntimeError):
    """Too many micro-steps or ticks in a row were left out. The message names where to look."""


@dataclass(frozen=True)
class Tick:
    """One update of one level, or the update that was left out."""

    name: str
    tokens: int
    """T at the end of the quantum"""
    window_tokens: int
    """tokens since the level's last tick, those of micro-steps that were left out included"""
    updates: int
    """updates done so far, this one included"""
    lr: float
    grad_norm: float
    """of the level's mean gradient over the window, before the clip"""
    update_ratio: float
    """||dW|| / ||W||; nan when not measured"""
    drift: float
    """||W - W_0|| / ||W_0||; nan when not measured"""
    skipped: str
    """why the update was left out; empty when it was made"""
    seconds: float
    num_bytes: float
    """payload that one rank sent for this level since its last tick, folds not included"""


@dataclass
class _LevelState:
    targets: Tensor  # real targets in the window, float64 on the device
    last_tick_tokens: int = 0
    done: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    # Ticks that were due by T = due_since under earlier clocks: a resumed run may have another period.
    due_before: int = 0
    due_since: int = 0
    bytes_at_tick: float = 0.0


class LevelScheduler:
    """All levels of one model. Construct on every rank after torch.distributed is initialised; `close` when done."""

    def __init__(self, model: nn.Module, config: LevelsConfig, seq_len: int, device: torch.device | str | None = None):
        self.device = torch.device(device if device is not None else next(model.parameters()).device)
        init_deepspeed(self.device)
        self.config, self.model = config, model
        self.num_sequences = config.check_sequences(seq_len, dist.get_world_size())
        levels = config.resolved()
        self.tokens = 0
        self.ledger = Ledger()
        parts = split_levels(model, levels)
        self._broadcast(parts)
        phases = staggered_phases(
            [level.period_tokens for level in levels], [level.phase_tokens for level in levels], config.quantum
        )
        self.clocks = {
            level.name: TokenClock(level.period_tokens, phase) for level, phase in zip(levels, phases, strict=True)
        }
        # ZeRO-3 gathers weights during backward. In one process group a gather could be matched with a reduction.
        gathers = any(level.zero_stage == 3 for level in levels)
        self._reductions = ReductionOrder(dist.new_group() if gathers else None)
        self.engines = {
            part.config.name: LevelEngine(part, config, self.device, self.ledger, self._reductions) for part in parts
        }
        self._levels = {
            name: _LevelState(torch.zeros((), dtype=torch.float64, device=self.device)) for name in self.engines
        }
        self.guard = LossGuard(config.spike_sigma, self.device, self.ledger)
        self.micro_steps = 0

    def _broadcast(self, parts: Sequence[Any]) -> None:
        """Gives every rank the weights of rank 0, because ranks may have built the model with different seeds."""
        with self.ledger.row("-", STATE):
            for part in parts:
                for _, parameter in part.parameters:
                    dist.broadcast(parameter.data, src=0)

    def start_micro_step(self) -> None:
        """Before every forward whose loss goes into `backward`."""
        for engine in self.engines.values():
            engine.before_forward()

    def backward(self, loss_sum: Tensor, num_targets: int | Tensor) -> MicroStep:
        """One backward into all windows. `loss_sum`: sum over this rank's real targets, `num_targets`: their count.

        Every rank calls it once per micro-step. A rank without a sequence passes num_targets = 0 and contributes exact
        zeros, whatever its loss. No host sync: the returned sums and verdict are tensors on the device.
        """
        micro_step = self.guard.judge(loss_sum, num_targets)
        for engine in self.engines.values():
            engine.before_backward(micro_step.admitted)
        loss_sum.backward()
        for engine in self.engines.values():
            engine.after_backward()
        self._reductions.complete()
        for state in self._levels.values():
            state.targets += micro_step.num_targets
        self.micro_steps += 1
        return micro_step

    def finish_quantum(self) -> list[Tick]:
        """T += quantum; ticks the due levels in the order of the config; folds when the fold clock says so."""
        before, self.tokens = self.tokens, self.tokens + self.config.quantum
        ticks = [self._tick(name) for name in self.engines if self._due(name, before, self.tokens)]
        self._stop_if_stuck()
        every = self.config.fold_every_tokens
        if every is not None and TokenClock(every).due(before, self.tokens):
            self.fold()
        for name, engine in self.engines.items():
            if self._due(name, self.tokens, self.tokens + self.config.quantum):
                engine.prefetch()
        return ticks

    def _due(self, name: str, before: int, after: int) -> bool:
        return not self.engines[name].config.frozen and self.clocks[name].due(before, after)

    def _tick(self, name: str) -> Tick:
        engine, state = self.engines[name], self._levels[name]
        window_tokens = self.tokens - state.last_tick_tokens
        lr = engine.config.lr * self.config.schedule.factor(self.tokens)
        decay = (1 - lr * engine.config.weight_decay) ** (window_tokens / self.config.base_period_tokens)
        step = engine.step(lr, decay, state.targets)
        if step.skipped:
            state.skipped += 1
            state.skipped_in_a_row += 1
        else:
            state.done += 1
            state.skipped_in_a_row = 0
        state.last_tick_tokens = self.tokens
        state.targets.zero_()
        sent = self.ledger.payload(name)
        tick = Tick(
            name=name,
            tokens=self.tokens,
            window_tokens=window_tokens,
            updates=state.done,
            lr=lr,
            grad_norm=step.grad_norm,
            update_ratio=step.update_ratio,
            drift=step.drift,
            skipped=step.skipped,
            seconds=step.seconds,
            num_bytes=sent - state.bytes_at_tick,
        )
        state.bytes_at_tick = sent
        return tick

    def _stop_if_stuck(self) -> None:
        limit = self.config.max_consecutive_skips
        _, in_a_row, _ = self.guard.host_state()
        if in_a_row >= limit:
            raise TrainingStopped(
                f"{in_a_row} micro-steps in a row had a non-finite or spiking loss on a rank by T = {self.tokens} "
                f"tokens (max_consecutive_skips = {limit}): look at the data there, lower lr, or resume from earlier"
            )
        for name, state in self._levels.items():
            if state.skipped_in_a_row >= limit:
                raise TrainingStopped(
                    f"level {name!r} left out {state.skipped_in_a_row} ticks in a row by T = {self.tokens} tokens "
                    f"(max_consecutive_skips = {limit}): its gradients are not finite; lower lr or resume from "
                    "earlier"
                )

    def discard_window(self, name: str) -> None:
        """Forgets what level `name` has accumulated since its last tick; its clock goes on. For ablations."""
        self.engines[name].discard_window()
        self._levels[name].targets.zero_()

    def fold(self) -> None:
        """Reduces local sums into shards now. Changes the order of summation: only on the fold clock."""
        for engine in self.engines.values():
            engine.fold()

    @property
    def unreduced_bytes(self) -> int:
        """Bytes of this rank's sums that a fold would move into shards; equal on all ranks."""
        return sum(engine.unreduced_bytes for engine in self.engines.values())

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{level: {done, skipped, due}}; done + skipped == due."""
        return {
            name: {"done": state.done, "skipped": state.skipped, "due": self._ticks_due(name)}
            for name, state in self._levels.items()
        }

    def _ticks_due(self, name: str) -> int:
        """Ticks that were due by T under the clocks in force at the time; computed, not counted."""
        state, clock = self._levels[name], self.clocks[name]
        frozen = self.engines[name].config.frozen
        return state.due_before + (0 if frozen else clock.ticks(self.tokens) - clock.ticks(state.due_since))

    def next_tick(self, name: str) -> int | None:
        """T of the level's next update; None for a frozen one."""
        return (
            None if self.engines[name].config.frozen else self.clocks[name].next_tick(self.tokens, self.config.quantum)
        )

    @property
    def skipped_micro_steps(self) -> int:
        """Micro-steps so far in which a rank's part was left out. A host sync."""
        return self.guard.host_state()[0]

    @property
    def left_out_tokens(self) -> int:
        """Real targets left out so far: they count in T, but no level has learned from them. A host sync."""
        return self.guard.host_state()[2]

    def fragments(self) -> dict[str, Fragment]:
        """This rank's slices of masters ("NAME.master"), moments, W_0 ("NAME.initial"), open windows ("NAME.window").

        Views of the live tensors, or of host memory where a level sleeps; to load, call `prepare_to_load`, fill them in
        place, then `load`. Names do not depend on levels, ZeRO stages or the world size.
        """
        found: dict[str, Fragment] = {}
        for engine in self.engines.values():
            found.update(engine.fragments())
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and equal on all ranks: T, clocks, counters, optimizer step counts. A host sync."""
        levels = {}
        for name, engine in self.engines.items():
            state, clock = self._levels[name], self.clocks[name]
            levels[name] = {
                "period_tokens": clock.period,
                "phase_tokens": clock.phase,
                "last_tick_tokens": state.last_tick_tokens,
                "window_targets": int(state.targets.item()),
                "done": state.done,
                "skipped": state.skipped,
                "due": self._ticks_due(name),
                "skipped_in_a_row": state.skipped_in_a_row,
                **engine.state_dict(),
            }
        return {
            "tokens": self.tokens,
            "quantum_tokens": self.config.quantum,
            "micro_steps": self.micro_steps,
            "levels": levels,
            "guard": self.guard.state_dict(),
        }

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's unreduced sums {parameter: flat fp32}; empty right after a fold and where no level is local."""
        found: dict[str, Tensor] = {}
        for engine in self.engines.values():
            found.update(engine.rank_state())
        return found

    def prepare_to_load(self, state: dict[str, Any]) -> None:
        """Before the fragments are filled: makes `fragments()` list what was saved with `state`."""
        saved, own = state["levels"], set(self.engines)
        if set(saved) != own:
            raise LevelsError(
                f"the saved state has levels {sorted(saved)}, this run has {sorted(own)}: give them the same names"
            )
        if state["tokens"] % self.config.quantum:
            raise LevelsError(
                f"the saved T = {state['tokens']} is not a multiple of quantum_tokens = {self.config.quantum}: "
                f"resume with the saved quantum of {state['quantum_tokens']}"
            )
        self.tokens, self.micro_steps = state["tokens"], state["micro_steps"]
        for name, engine in self.engines.items():
            self._levels[name].last_tick_tokens = saved[name]["last_tick_tokens"]
            engine.prepare_to_load(saved[name])

    def load(self, state: dict[str, Any], rank_states: Sequence[dict[str, Tensor]] = ()) -> None:
        """After the fragments were filled: restores counters and refreshes the forward weights. A collective.

        `rank_states`: the `rank_state()` of the saved ranks that this rank takes over: at the same world size its own
        one, otherwise any split of all of them over the ranks. They are summed, so that the split does not matter.
        """
        for name, engine in self.engines.items():
            level, own = state["levels"][name], self._levels[name]
            own.targets.fill_(level["window_targets"])
            own.done, own.skipped = level["done"], level["skipped"]
            own.skipped_in_a_row = level["skipped_in_a_row"]
            # Older checkpoints have no "due"; their run had one clock from the start.
            own.due_before, own.due_since = level.get("due", own.done + own.skipped), state["tokens"]
            engine.load(level, rank_states)
        self.guard.load_state_dict(state["guard"])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 weights) on rank 0, (name, empty) elsewhere; a collective: iterate on every rank."""
        for engine in self.engines.values():
            yield from engine.weights()

    def describe(self) -> list[dict[str, Any]]:
        """The resolved numbers of every level, for the log and the run's record."""
        rows = []
        for name, engine in self.engines.items():
            row = asdict(engine.config) | {"phase_tokens": self.clocks[name].phase}
            rows.append(row | {"num_parameters": engine.num_parameters, "mode": engine.mode, "decay": engine.decay})
        return rows

    def close(self) -> None:
        """Removes every hook; the model keeps its weights (ZeRO-3: partitioned)."""
        for engine in self.engines.values():
            engine.close()
        self.ledger.close()
