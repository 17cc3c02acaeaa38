"""A run put together: model, levels, data, checkpoints and tracking on this rank, and what each beat of the loop does.

Position is one number. T, the global tokens consumed, decides which samples come next, which levels are due, when to
validate and when to save; so a resumed run only has to restore T, the levels' state and each rank's random state.
"""

import gc
import math
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import numpy
import torch
import torch.distributed as dist

from nltrain.checkpoint.checkpointer import Checkpointer
from nltrain.checkpoint.errors import StaleAttemptError
from nltrain.checkpoint.fence import Fence
from nltrain.checkpoint.load import Loaded
from nltrain.checkpoint.manifest import checkpoint_name
from nltrain.checkpoint.rng import capture_rng, restore_rng
from nltrain.collectives import Ranks
from nltrain.config import DERIVED, RunConfig, check_vocabulary, may_change_on_resume, to_dict
from nltrain.data import Batch, TokenStream, open_plan
from nltrain.errors import ConfigError
from nltrain.evaluate.sample import sample_text
from nltrain.evaluate.validation import Validation
from nltrain.fragment import Fragment
from nltrain.levels.config import ScheduleConfig
from nltrain.levels.digest import weights_sha256
from nltrain.levels.guard import MicroStep
from nltrain.levels.quantum import cut_quantum
from nltrain.levels.scheduler import LevelScheduler, Tick
from nltrain.model import build
from nltrain.store import open_store
from nltrain.supervision import (
    FINISHING,
    LEFT_AS,
    SAVING,
    STARTING,
    TRAINING,
    VALIDATING,
    WAITING_FOR_DATA,
    Supervision,
    Unsupervised,
    Wish,
)
from nltrain.track.left_out import LeftOut, left_out_line
from nltrain.track.progress import Meter, Speed, duration, progress_line
from nltrain.track.record import Record

# Longest wait for the save in flight when a run fails; ranks that are gone make it end at once.
LAST_SAVE_S = 30.0


# Of the time until a kill, what is kept for the rest: gathering, the commit, the last rows.
LEAVE_RESERVE_S = 10.0
FOREVER_S = 1e9


class Run:
    """One rank's part of a run. Use as a context manager; every method is called by all ranks alike."""

    def __init__(self, config: RunConfig, supervision: Supervision | None = None) -> None:
        self.config = config = config.resolved()
        self._supervision = supervision or Unsupervised(time.time())
        self._supervision.beat(STARTING, 0)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(config.cluster.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.plan = open_plan(config.data)
        check_vocabulary(config, self.plan.vocab_size)
        self._store = open_store(config.checkpoint.url)
        self.checkpoints = Checkpointer(self._store, config.name, attempt=None, config=config.checkpoint)
        self.attempt = self.checkpoints.attempt
        self._ranks = Ranks(config.cluster.process_group_timeout_s)
        self._fence = Fence(self._store, config.name, self.attempt) if self.rank == 0 else None
        torch.manual_seed(config.train.seed)
        self.model = build(config.model).to(self.device)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self.levels = LevelScheduler(self.model, config.levels, config.data.seq_len, self.device)
        self.meter = Meter(self.device)
        self._left_out = LeftOut()
        self._speed = Speed()
        self._stream: TokenStream | None = None
        self._wait_s = 0.0
        self._validation: Validation | None = None
        self._saved_at = -1
        self._saved_bytes, self._bytes_per_s = 0, 0.0  # of the last save, as measured
        self._checkpoint = ""
        self._logged_at = 0
        self._ticked: Counter[str] = Counter()
        self._wish = Wish.GO_ON
        self._changes: list[str] = []
        self._quanta_done = 0
        self.record = Record(config, self.rank, self._store, lambda: not (self._fence and self._fence.stale))
        # What is imported and built by now lasts as long as the run: no garbage collection, ours or DeepSpeed's, has to
        # look at its million objects again (0.3 s each time, on a random rank at a random step).
        gc.freeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._stream:
            self._stream.close()
        if kind is not None:
            self.checkpoints.settle(LAST_SAVE_S)  # what was trained and copied may still be committed
        if self._fence:
            self._fence.close()
        self.record.close(exit_code=0 if kind is None else 1)
        self.levels.close()
        gc.unfreeze()

    # ---- beats of the loop, in order ---------------------------------------------------------------------------------

    def resume(self) -> None:
        """Go on from the newest sound checkpoint of this run, or start afresh; says which."""
        config, may_change = to_dict(self.config), may_change_on_resume(self.config)
        loaded = self.checkpoints.resume(self._fragments_saved_with, config, may_change, DERIVED)
        if loaded:
            self._restore(loaded)
        else:
            _seed_all(self.config.train.seed * 1_000_003 + self.rank)
        self._logged_at = self.tokens
        self._announce(loaded)
        self._stream = TokenStream(self.config.data, self.plan, self._my_samples())
        # The attempt before saved this moment and ended before it had validated.
        if (
            loaded
            and self.validation_is_due()
            and self._ranks.from_first(lambda: self.record.lacks_validation(self.tokens))
        ):
            self.validate()

    def quanta(self) -> Iterator[int]:
        """The quanta still to train, by number."""
        return iter(range(self.tokens // self.config.quantum_tokens, self.config.num_quanta))

    def micro_batches(self, quantum: int) -> Iterator[Batch]:
        """This rank's batches of one quantum; every rank gets equally many, padding where it has no sequence."""
        assert self._stream is not None
        for _ in self._cut():
            # Whatever is fetched, built or compiled on first use belongs to the start.
            self._beat(WAITING_FOR_DATA if self._quanta_done else STARTING)
            batch = next(self._stream).to(self.device, non_blocking=True)
            self._beat(TRAINING if self._quanta_done else STARTING)
            self.meter.start()
            yield batch
        self._quanta_done += 1

    def count(self, batch: Batch, micro_step: MicroStep) -> None:
        """What came of one micro-step; read on the host when the next line is due."""
        self.meter.add(micro_step.loss_sum, micro_step.num_targets, micro_step.left_out)
        self._left_out.add(batch.sample_indices, batch.num_targets, micro_step.verdict)

    def log(self, ticks: list[Tick]) -> None:
        """A metrics row per tick; every `track.log_every_quanta` a row and a line for the steps since the last one."""
        for tick in ticks:
            values = {name: value for name, value in vars(tick).items() if name not in ("name", "tokens")}
            self._row("tick", level=tick.name, period_tokens=self.levels.clocks[tick.name].period, **values)
            self._ticked[tick.name + ("(skipped)" if tick.skipped else "")] += 1
        config, step = self.config, self.tokens // self.config.quantum_tokens
        if step % config.track.log_every_quanta and step != config.num_quanta:
            return
        interval = self.meter.take(self._take_wait_s())
        tokens, self._logged_at = self.tokens - self._logged_at, self.tokens
        ticked, self._ticked = self._ticked, Counter()
        speed = self._speed.update(tokens, interval.seconds)
        self._row(
            "step",
            step=step,
            total_tokens=config.num_quanta * config.quantum_tokens,
            step_tokens=tokens,
            tokens_per_s=round(tokens / max(interval.seconds, 1e-9), 1),
            level_updates=self.levels.counts,
            **interval._asdict(),
        )
        self._name_left_out(interval.left_out)
        eta_s = (config.num_quanta - step) * config.quantum_tokens / speed
        names = " ".join(name if count == 1 else f"{count}x{name}" for name, count in ticked.items())
        self.record.say(progress_line(step, config.num_quanta, self.tokens, interval, speed, eta_s, names))
        loss = interval.loss if math.isfinite(interval.loss) else None
        self._show("training", loss=loss, tokens_per_s=round(speed, 1))

    def validation_is_due(self) -> bool:
        every, quantum = self.config.train.validate_every_tokens, self.config.quantum_tokens
        if not self.config.train.validation_sequences:
            return False
        last = self.tokens >= self.config.num_quanta * quantum
        return last or bool(every and self.tokens // every > (self.tokens - quantum) // every)

    def validate(self) -> None:
        """Loss and perplexity on the held-out sequences, beside what counting alone achieves."""
        started_s = time.monotonic()
        self._beat(VALIDATING)
        with self.meter.paused():
            if self._validation is None:
                self._validation = Validation(self.config, self.rank, self.world_size, self.device)
            result = self._validation.run(self.model)
        self._row("validation", **result, seconds=round(time.monotonic() - started_s, 3))
        beside = "".join(
            f", {name} {result[key]:.4f}"
            for name, key in (("unigram", "unigram_entropy"), ("bigram", "bigram_entropy"))
            if result[key] is not None
        )
        self.record.say(
            f"validation at {self.tokens:,} tokens: loss {result['loss']:.4f} nats per token, perplexity "
            f"{result['perplexity']:.2f}{beside} ({result['targets']:,} targets)"
        )

    def checkpoint_is_due(self) -> bool:
        at_fold = self.config.levels.fold_every_tokens is None or self.levels.unreduced_bytes == 0
        return self.checkpoints.due(self.tokens - self.config.quantum_tokens, self.tokens, at_fold)

    def save(self, retain: bool = True) -> bool:
        """Start a checkpoint of this moment; training waits for the copy to host memory only. False: skipped."""
        self._beat(SAVING)
        with self.meter.paused():
            state = {
                "config": to_dict(self.config),
                "dataset_fingerprint": self._fingerprint(),
                "data": self.plan.state(self.tokens // self.config.data.seq_len),
                "levels": self.levels.state_dict(),
                "wandb_id": self.record.wandb_id,
                "attempt": self.attempt,
            }
            own = {"rng": capture_rng(), "levels": self.levels.rank_state()}
            weights = {name: (f"{name}.master", shape) for name, shape in self._shapes.items()}
            started = self.checkpoints.save(self.tokens, self.levels.fragments(), state, own, weights, retain)
            self._log_saves()
        if started:
            self._saved_at, self._checkpoint = self.tokens, checkpoint_name(self.tokens, self.attempt)
        return started

    def must_leave(self) -> bool:
        """Whether any rank was told to leave: preemption, a resize, the user's stop. Collective, off the device.

        Raises StaleAttemptError on every rank once rank 0 has seen that a newer attempt of the run has begun.
        """
        stale = self._fence.stale if self._fence else ""
        told = self._ranks.gather_ints([int(self._supervision.wish()), bool(stale)])
        if any(row[1] for row in told):
            raise StaleAttemptError(stale or f"attempt {self.attempt} of run {self.config.name} is stale; it must stop")
        self._wish = Wish(max(row[0] for row in told))
        return self._wish != Wish.GO_ON

    def leave(self) -> dict[str, Any]:
        """Save this moment and go, before the run is complete. Returns what `left` says why."""
        left = LEFT_AS[self._wish]
        self._fold_before_leaving()
        self._save_for_good(retain=False)
        self.record.goodput(self.tokens)
        self._row("end", reason=left, level_updates=self.levels.counts)
        self.record.publish()
        self._show(left, force=True)
        self.record.say(f"{left}: checkpoint at {self.tokens:,} tokens is committed")
        return {"left": left, "tokens": self.tokens, "checkpoint": self._checkpoint}

    def finish(self) -> dict[str, Any]:
        """The last checkpoint, the sample and the summary. Returns the summary on rank 0, the counts elsewhere."""
        self._save_for_good()
        self._beat(FINISHING)
        digest = weights_sha256(self.levels)
        if self.config.train.sample_tokens:
            text = sample_text(self.model, self.plan.datasets[0], self.config.train, self.device)
            self._row("sample", text=text)
            self.record.say(f"sample:\n{text}")
        self.record.goodput(self.tokens)
        self._row("end", reason="finished", level_updates=self.levels.counts, weights_sha256=digest)
        self.record.publish()
        summary = self.record.report()
        self._show("finished", force=True, summary=summary)
        if summary is None:
            return {"level_updates": self.levels.counts, "checkpoint": self._checkpoint}
        first, last = (f"{x:.4f}" if x is not None else "-" for x in (summary["loss_first"], summary["loss_last"]))
        self.record.say(
            f"finished: {summary['tokens']:,} tokens in {duration(summary['seconds'])}, loss {first} -> {last}; "
            f"{self.record.folder / 'summary.json'}"
        )
        return summary | {"checkpoint": self._checkpoint}

    # ---- helpers -----------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """T: global tokens consumed."""
        return self.levels.tokens

    def _cut(self) -> list[list[range]]:
        num_sequences = self.config.quantum_tokens // self.config.data.seq_len
        return cut_quantum(num_sequences, self.config.train.micro_batch_size, self.world_size)

    def _my_samples(self) -> Iterator[range]:
        """Global sample indices of this rank's micro-batches from T on: a function of T, rank and world size alone."""
        per_quantum = self.config.quantum_tokens // self.config.data.seq_len
        cut = self._cut()
        for quantum in self.quanta():
            first = quantum * per_quantum
            for step in cut:
                yield range(first + step[self.rank].start, first + step[self.rank].stop)

    def _fragments_saved_with(self, state: dict[str, Any]) -> dict[str, Fragment]:
        self.plan.restore(state["data"], self.config.checkpoint.other_data)
        self._changes = [*self._compare_data(state), *self._compare_schedules(state)]
        self.levels.prepare_to_load(state["levels"])
        return self.levels.fragments()

    def _compare_data(self, state: dict[str, Any]) -> list[str]:
        """One line where the data are others than those of `state`."""
        before, now = state["dataset_fingerprint"], self._fingerprint()
        order = {name: (state["data"][name], getattr(self.config.data, name)) for name in ("seed", "window_shards")}
        words = [f"data.{name} {then} -> {here}" for name, (then, here) in order.items() if then != here]
        if before != now:
            urls = ", ".join(dataset["url"] for dataset in state["data"]["datasets"])
            words.insert(0, f"dataset {urls} ({before[:12]}) -> {self.config.data.prefix} ({now[:12]})")
        return [f"other data from {state['levels']['tokens']:,} tokens on: {', '.join(words)}"] if words else []

    def _compare_schedules(self, state: dict[str, Any]) -> list[str]:
        """One line where the learning rates go on otherwise than the run of `state` would have; may refuse."""
        now, tokens = self.config.levels.schedule, state["levels"]["tokens"]
        stored = ScheduleConfig(**state["config"]["levels"]["schedule"])
        if stored == now:
            return []
        if (factors := now.change_at(tokens, stored)) is None:
            same = f"the lr factor, {now.factor(tokens):.4g} here, goes on as before"
            return [f"levels.schedule at {tokens:,} tokens: {same} (extension={now.extension})"]
        end = (
            ""
            if now.kind == "constant"
            else f", then {now.kind} to {now.min_lr_fraction:g} at {now.total_tokens:,} tokens"
        )
        line = (
            f"levels.schedule at {tokens:,} tokens: the lr factor was {factors[0]:.4g} and now is {factors[1]:.4g}"
            f"{'' if now.extension == 'flat' else end} (extension={now.extension})"
        )
        if now.extension == "refuse":
            raise ConfigError(
                f"{line}: set levels.schedule.extension=follow to take it, rewarm or flat with "
                f"levels.schedule.extends_tokens={stored.total_tokens}, or the schedule back"
            )
        return [line]

    def _fingerprint(self) -> str:
        return "-".join(dataset.fingerprint for dataset in self.plan.datasets)

    def _restore(self, loaded: Loaded) -> None:
        for change in self._changes:
            self.checkpoints.note_in_lineage(change)
        own = [loaded.rank_state] if loaded.same_world_size else []
        if not loaded.same_world_size:
            saved_by = range(self.rank, loaded.manifest.world_size, self.world_size)
            own = [loaded.stored.rank_state(rank) for rank in saved_by]
        self.levels.load(loaded.state["levels"], [state["levels"] for state in own])
        if loaded.same_world_size:
            restore_rng(loaded.rank_state["rng"])
        else:
            _seed_all((self.config.train.seed * 1_000_003 + self.rank) ^ loaded.tokens)
        self._saved_at, self._checkpoint = loaded.tokens, loaded.name

    def _announce(self, loaded: Loaded | None) -> None:
        """Note this attempt: who takes part, where it starts, and what an earlier one had done beyond that point."""
        who = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), "attempt": self.attempt}
        self.record.note_rank(who)
        lost, reason = self.record.begin(
            self.attempt, self.world_size, self.tokens, loaded.name if loaded else None, self._supervision.started_s
        )
        self._show("starting", force=True)
        if loaded:
            self.record.say(
                f"attempt {self.attempt}: resumed from checkpoint {loaded.name} at {self.tokens:,} tokens with "
                f"{self.world_size} workers; {lost:,} tokens are trained again ({reason})"
            )
        else:
            self.record.say(f"attempt {self.attempt}: a new run with {self.world_size} workers")
        for change in self._changes:
            self.record.say(change)
        for row in self.levels.describe():
            self.record.say(
                f"level {row['name']}: {row['num_parameters']:,} parameters, every {row['period_tokens']:,} tokens "
                f"(phase {row['phase_tokens']:,}), {row['optimizer']} lr {row['lr']:g}, ZeRO-{row['zero_stage']} "
                f"({row['mode']}), {row['decay']}"
            )

    def _fold_before_leaving(self) -> None:
        """Sums that are not reduced make a save several times as large. Where the world changes anyway, reduce them;
        the user's stop keeps them, and with them the order of summation, where that can be written in time."""
        self._log_saves()
        left_ms = int(1000 * min(FOREVER_S, max(0.0, self._supervision.left_s() - LEAVE_RESERVE_S)))
        mine = [self.levels.unreduced_bytes, left_ms, int(self._bytes_per_s), self._saved_bytes]
        rows = self._ranks.gather_ints(mine)
        unreduced, left_s, rate = sum(row[0] for row in rows), min(row[1] for row in rows) / 1000, rows[0][2]
        size = unreduced + rows[0][3]
        if not unreduced or (self._wish == Wish.STOP and (left_s >= FOREVER_S or size <= rate * left_s)):
            return
        if self._wish == Wish.STOP:
            speed = f"at {rate / 1e6:,.0f} MB/s" if rate else "at a speed that no save has shown yet"
            self.record.say(
                f"stopping: {size / 1e9:.2f} GB {speed} are not sure to be written in the {left_s:.0f} s that are "
                f"left. Gradient sums are folded first: the run goes on within fp32 rounding, not bit for bit"
            )
        self.levels.fold()

    def _save_for_good(self, retain: bool = True) -> None:
        """A committed checkpoint of this very moment, whatever the policy says of a busy writer."""
        while self._saved_at != self.tokens and not self.save(retain):
            time.sleep(0.2)  # the one in flight is on its way
        self._beat(SAVING)
        self.checkpoints.wait()
        self._log_saves()

    def _beat(self, phase: str) -> None:
        self._supervision.beat(phase, self.tokens)

    def _show(self, state: str, force: bool = False, **values: Any) -> None:
        """Bring `status.json` up to date."""
        levels: dict[str, Any] = {
            name: count | {"next_tick_tokens": self.levels.next_tick(name), "period_tokens": clock.period}
            for (name, count), clock in zip(self.levels.counts.items(), self.levels.clocks.values(), strict=True)
        }
        self.record.show(
            state, self.tokens, force, attempt=self.attempt, workers=self.world_size, levels=levels, **values
        )

    def _row(self, kind: str, **values: Any) -> None:
        self.record.row(kind, self.tokens, **values)

    def _name_left_out(self, num_micro_steps: int) -> None:
        """A row and a line with the rank and the samples of every part that the guard left out."""
        own = self._left_out.take()
        if not num_micro_steps:  # equal on all ranks, as what follows is collective
            return
        everyone = self._ranks.gather(own)
        parts = [{"rank": rank} | part for rank, each in enumerate(everyone) for part in each]
        self._row("left_out", left_out_tokens=sum(part["tokens"] for part in parts), parts=parts)
        self.record.say(left_out_line(parts))

    def _take_wait_s(self) -> float:
        assert self._stream is not None
        waited_s, self._wait_s = self._stream.wait_s - self._wait_s, self._stream.wait_s
        return waited_s

    def _log_saves(self) -> None:
        for result in self.checkpoints.poll():
            values = result._asdict() | {"saved_tokens": result.tokens}
            del values["tokens"]
            self._row("checkpoint" if not result.error else "checkpoint_failed", **values)
            if not result.error:
                self._saved_bytes = result.num_bytes
                self._bytes_per_s = result.num_bytes / max(result.write_seconds, 1e-3)
            self.record.publish()


def _seed_all(seed: int) -> None:
    """Every generator that a checkpoint keeps."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
