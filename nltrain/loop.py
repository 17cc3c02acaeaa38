"""The training loop. `run.py` says what each beat does; `levels/` decides which level steps when.

The way of a token: plan -> S3 range read -> tokens -> model -> loss -> backward -> each level accumulates -> the clock
ticks -> due levels reduce, clip, step, gather -> metrics -> maybe checkpoint, maybe evaluations -> next.
"""

from typing import Any

from nltrain.config import RunConfig
from nltrain.run import Run
from nltrain.supervision import Supervision


def train(config: RunConfig, supervision: Supervision | None = None) -> dict[str, Any]:
    """Start the run that `config` describes, or go on with it, until its last quantum; every rank calls this.

    torch.distributed must be initialised. Returns the run's summary on rank 0 and the counts of the levels elsewhere;
    where `supervision` asks to leave before the end, {"left": why, "tokens": T, "checkpoint": its name} on every rank.
    Raises ConfigError, StoreError, DataError or CheckpointError with one line that says what to do.
    """
    with Run(config, supervision) as run:
        run.resume()
        for quantum in run.quanta():
            for batch in run.micro_batches(quantum):
                run.levels.start_micro_step()
                loss_sum = run.model.loss(batch.tokens, batch.targets, batch.documents)
                run.meter.forward_ended()
                run.count(batch, run.levels.backward(loss_sum, batch.num_targets))
            ticks = run.levels.finish_quantum()
            run.log(ticks)
            if run.checkpoint_is_due():
                run.save()  # first: an evaluation that fails must not lose what was trained
            for evaluation in run.due_evaluations():
                run.evaluate(evaluation)
            if run.must_leave():
                return run.leave()
        return run.finish()
