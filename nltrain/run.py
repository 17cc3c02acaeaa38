"""A run put together: model, levels, data, checkpoints and tracking on this rank, and what each beat of the loop does.

Position is one number. T, the global tokens consumed, decides which samples come next, which levels are due, when to
evaluate and when to save; so a resumed run only has to restore T, the levels' state and each rank's random state.
"""

import gc
import os
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

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
from nltrain.data import Batch, TokenStream, open_order
from nltrain.derived import cut_of, evaluation_setting, run_facts, samples_of, total_tokens
from nltrain.device import prepare_device
from nltrain.evaluate.protocol import Evaluation
from nltrain.evaluate.registry import make_evaluations
from nltrain.evaluate.sample import sample_text
from nltrain.fragment import Fragment
from nltrain.levels.digest import weights_sha256
from nltrain.levels.guard import MicroStep
from nltrain.levels.scheduler import LevelScheduler, Tick
from nltrain.model import arrange, build, say_choices
from nltrain.resume import data_changes, rank_seed, saved_rank_states, schedule_changes, seed_all
from nltrain.saving import SaveLog
from nltrain.store import open_store
from nltrain.supervision import (
    FINISHING,
    LEFT_AS,
    SAVING,
    STARTING,
    TRAINING,
    VALIDATING,
    WAITING_FOR_DATA,
    WAITING_FOR_SAVE,
    Supervision,
    Unsupervised,
    Wish,
)
from nltrain.track import lines
from nltrain.track.progress import Meter
from nltrain.track.record import Record
from nltrain.track.rows import EndRow, SampleRow, TickRow, evaluation_row
from nltrain.track.steps import StepLog

# Longest wait for the save in flight when a run fails; ranks that are gone make it end at once.
LAST_SAVE_S = 30.0


class Run:
    """One rank's part of a run. Use as a context manager; all ranks call its methods in the same order.

    Making one builds everything and claims the next attempt of the run; `resume` restores its state.
    """

    def __init__(self, config: RunConfig, supervision: Supervision | None = None) -> None:
        self.config = config = config.resolved()
        self._supervision = supervision or Unsupervised(time.time())
        self._supervision.beat(STARTING, 0)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self._settings = prepare_device(config.cluster)
        self.order = open_order(config.data)
        check_vocabulary(config, self.order.vocab_size)
        self._store = open_store(config.checkpoint.url)
        self.checkpoints = Checkpointer(self._store, config.name, attempt=None, config=config.checkpoint)
        self.attempt = self.checkpoints.attempt
        self._ranks = Ranks(config.cluster.process_group_timeout_s)
        self._fence = Fence(self._store, config.name, self.attempt) if self.rank == 0 else None
        torch.manual_seed(config.train.seed)
        dtype = torch.bfloat16 if config.levels.dtype == "bf16" else torch.float32
        self._choices = say_choices(config.model, self.device, dtype)
        self.model = build(config.model, self.device)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self.levels = LevelScheduler(self.model, config.levels, config.data.seq_len, self.device)
        self.evaluations = make_evaluations(evaluation_setting(config, self.rank, self.world_size, self.device))
        self.meter = Meter(self.device)
        self._stream: TokenStream | None = None
        self._saved_at, self._checkpoint = -1, ""  # T and name of the last save that was started or resumed from
        self._wish = Wish.GO_ON
        self._changes: list[str] = []
        self._quanta_done = 0
        self.record = Record(config.track, run_facts(config), self.rank, self._store, self._is_newest)
        self._steps = StepLog(self.record, self.meter, self._ranks, total_tokens(config))
        self._saves = SaveLog(self.checkpoints, self.record, self._ranks)
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
        self.checkpoints.close()
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
            seed_all(rank_seed(self.config.train.seed, self.rank))
        self._steps.start_at(self.tokens)
        self._announce(loaded)
        samples = samples_of(self.config, self.tokens, self.rank, self.world_size)
        self._stream = TokenStream(self.config.data, self.order, samples, partial(arrange, self.config.model))
        if loaded and (due := self.due_evaluations()):
            # The attempt before saved at this T first, and may have ended before it evaluated.
            names = [evaluation.name for evaluation in due]
            missing = self._ranks.from_first(lambda: self.record.missing_evaluations(self.tokens, names))
            for evaluation in due:
                if evaluation.name in missing:
                    self.evaluate(evaluation)

    def quanta(self) -> Iterator[int]:
        """The quanta still to train, by number."""
        return iter(range(self.tokens // self.config.quantum_tokens, self.config.num_quanta))

    def micro_batches(self, quantum: int) -> Iterator[Batch]:
        """This rank's batches of one quantum; every rank gets equally many, padding where it has no sequence."""
        assert self._stream is not None
        for _ in cut_of(self.config, self.world_size):
            # The first quantum fetches, builds and compiles on first use: it belongs to the start.
            self._beat(WAITING_FOR_DATA if self._quanta_done else STARTING)
            batch = next(self._stream).to(self.device, non_blocking=True)
            self._beat(TRAINING if self._quanta_done else STARTING)
            self.meter.start()
            yield batch
        self._quanta_done += 1

    def count(self, batch: Batch, micro_step: MicroStep) -> None:
        """Add one micro-step to the counters, on the device; the host reads them when the next line is due."""
        self.meter.add(micro_step.loss_sum, micro_step.num_targets, micro_step.left_out)
        self._steps.count(batch.sample_indices, batch.num_targets, micro_step.verdict)

    def log(self, ticks: list[Tick]) -> None:
        """A row per tick; every `track.log_every_quanta` a row and a line for the steps since the last one."""
        assert self._stream is not None
        for tick in ticks:
            values = {name: value for name, value in vars(tick).items() if name not in ("name", "tokens")}
            period = self.levels.clocks[tick.name].period
            self._steps.tick(TickRow(tokens=self.tokens, level=tick.name, period_tokens=period, **values))
        step = self.tokens // self.config.quantum_tokens
        if step % self.config.track.log_every_quanta == 0 or step == self.config.num_quanta:
            shown = self._steps.write(step, self.tokens, self.levels.counts, self._stream.wait_s)
            self._show("training", **shown)

    def checkpoint_is_due(self) -> bool:
        """Whether to save at this T. Collective where `checkpoint.every_minutes` is on."""
        at_fold = self.config.levels.fold_every_tokens is None or self.levels.unreduced_bytes == 0
        return self.checkpoints.due(self.tokens - self.config.quantum_tokens, self.tokens, at_fold)

    def save(self, retain: bool = True) -> bool:
        """Start a checkpoint of this moment; training waits for the copy to host memory only. False: skipped."""
        with self.meter.paused():
            if self.config.checkpoint.when_busy == "wait":
                self._beat(WAITING_FOR_SAVE)
                self.checkpoints.settle(self.config.checkpoint.timeout_s)
            self._beat(SAVING if self.config.checkpoint.asynchronous else WAITING_FOR_SAVE)
            state = {
                "config": to_dict(self.config),
                "dataset_fingerprint": self._fingerprint(),
                "data": self.order.state(self.tokens // self.config.data.seq_len),
                "levels": self.levels.state_dict(),
                "wandb_id": self.record.wandb_id,
                "attempt": self.attempt,
            }
            own = {"rng": capture_rng(), "levels": self.levels.rank_state()}
            weights = {name: (f"{name}.master", shape) for name, shape in self._shapes.items()}
            started = self.checkpoints.save(self.tokens, self.levels.fragments(), state, own, weights, retain)
            self._saves.write(self.tokens)
        self._beat(TRAINING)  # the slow phase ends here, not with the next batch: ranks meet before it
        if started:
            self._saved_at, self._checkpoint = self.tokens, checkpoint_name(self.tokens, self.attempt)
        return started

    def due_evaluations(self) -> list[Evaluation]:
        """The evaluations to run at this T."""
        return [evaluation for evaluation in self.evaluations if evaluation.due(self.tokens)]

    def evaluate(self, evaluation: Evaluation) -> None:
        """Run one evaluation; a row and a line with its metrics. Collective."""
        began_s = time.monotonic()
        self._beat(VALIDATING)
        with self.meter.paused():
            metrics = evaluation.run(self.model)
        self._beat(TRAINING)
        seconds = round(time.monotonic() - began_s, 3)
        self.record.row(evaluation_row(evaluation.name, self.tokens, metrics, seconds))
        self.record.say(lines.evaluation_line(evaluation.name, self.tokens, metrics))

    def must_leave(self) -> bool:
        """Whether any rank was asked to leave: preemption, a resize, the user's stop. Collective, off the device.

        Raises StaleAttemptError on every rank once rank 0 has seen that a newer attempt of the run has begun.
        """
        stale = self._fence.stale if self._fence else ""
        asked = self._ranks.gather_ints([int(self._supervision.wish()), bool(stale)])
        if any(row[1] for row in asked):
            raise StaleAttemptError(stale or f"attempt {self.attempt} of run {self.config.name} is stale; it must stop")
        self._wish = Wish(max(row[0] for row in asked))
        return self._wish != Wish.GO_ON

    def leave(self) -> dict[str, Any]:
        """Save this moment and end, before the run is complete. Returns `left` (why), `tokens` and `checkpoint`."""
        left = LEFT_AS[self._wish]
        self._saves.write(self.tokens)
        if self._saves.must_fold(self._wish, self.levels.unreduced_bytes, self._supervision.left_s()):
            self.levels.fold()
        self._save_for_good(retain=False)
        self._log_end(left)
        self._show(left, force=True)
        self.record.say(lines.left_line(left, self.tokens))
        return {"left": left, "tokens": self.tokens, "checkpoint": self._checkpoint}

    def finish(self) -> dict[str, Any]:
        """The last checkpoint, the sample and the summary. Returns the summary on rank 0, the counts elsewhere."""
        self._save_for_good()
        self._beat(FINISHING)
        digest, train = weights_sha256(self.levels), self.config.train
        if train.sample_tokens:
            text = sample_text(self.model, self.order.datasets[0], train.sample_tokens, train.seed, self.device)
            self.record.row(SampleRow(tokens=self.tokens, text=text))
            self.record.say(f"sample:\n{text}")
        self._log_end("finished", digest)
        summary = self.record.report()
        self._show("finished", force=True, summary=summary)
        if summary is None:
            return {"level_updates": self.levels.counts, "checkpoint": self._checkpoint}
        self.record.say(lines.finished_line(summary, self.record.folder / "summary.json"))
        return summary | {"checkpoint": self._checkpoint}

    # ---- helpers -----------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """T: global tokens consumed."""
        return self.levels.tokens

    def _is_newest(self) -> bool:
        """Whether no newer attempt has been seen; rank 0 alone looks."""
        return not (self._fence and self._fence.stale)

    def _fragments_saved_with(self, state: dict[str, Any]) -> dict[str, Fragment]:
        """The tensors to fill from the checkpoint of `state`, after a look at what has changed since."""
        self.order.restore(state["data"], self.config.checkpoint.other_data)
        self._changes = data_changes(state, self.config.data, self._fingerprint())
        self._changes += schedule_changes(state, self.config.levels.schedule)
        self.levels.prepare_to_load(state["levels"])
        return self.levels.fragments()

    def _fingerprint(self) -> str:
        return "-".join(dataset.fingerprint for dataset in self.order.datasets)

    def _restore(self, loaded: Loaded) -> None:
        """Everything that the fragments do not hold: counters, unreduced sums, random states."""
        for change in self._changes:
            self.checkpoints.note_in_lineage(change)
        own = saved_rank_states(loaded, self.rank, self.world_size)
        self.levels.load(loaded.state["levels"], [state["levels"] for state in own])
        if loaded.same_world_size:
            restore_rng(loaded.rank_state["rng"])
        else:
            seed_all(rank_seed(self.config.train.seed, self.rank, loaded.tokens))
        self._saved_at, self._checkpoint = loaded.tokens, loaded.name

    def _announce(self, loaded: Loaded | None) -> None:
        """Note this attempt: who takes part, where it starts, and what an earlier one had done beyond that point."""
        who = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), "attempt": self.attempt}
        self.record.note_rank(who)
        name, started_s = loaded.name if loaded else None, self._supervision.started_s
        announcement = self.record.begin(self.attempt, self.world_size, self.tokens, name, started_s)
        self._show("starting", force=True)
        choices = (f"device: {self._settings}", f"model: {self._choices}")
        for line in (announcement, *choices, *self._changes, *map(lines.level_line, self.levels.describe())):
            self.record.say(line)

    def _save_for_good(self, retain: bool = True) -> None:
        """A committed checkpoint of this very moment, even where the one before is still being written."""
        while self._saved_at != self.tokens and not self.save(retain):
            time.sleep(0.2)
        self._beat(WAITING_FOR_SAVE)
        self.checkpoints.wait()
        self._saves.write(self.tokens)

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

    def _log_end(self, reason: str, weights_digest: str | None = None) -> None:
        """The last rows of this attempt, copied beside the checkpoints."""
        self.record.goodput(self.tokens)
        counts = self.levels.counts
        self.record.row(EndRow(tokens=self.tokens, reason=reason, level_updates=counts, weights_sha256=weights_digest))
        self.record.publish()
