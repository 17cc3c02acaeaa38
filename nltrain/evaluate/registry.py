"""The evaluations of a run, in the order in which they run at the end of a quantum.

To add one, touch this room alone: write `nltrain/evaluate/NAME.py` with a class as in `protocol.py`, constructed from
`(setting, held_out)`; add the class to `EVALUATIONS`; test it in `tests/evaluate/test_NAME.py`. The loop asks each
evaluation at the end of every quantum whether it is due. Its result becomes a row of kind "evaluation" with its name, a
printed line, and in W&B `evaluation/NAME/METRIC`. An evaluation that a killed attempt missed at the T of its last
checkpoint is made up for when the run resumes. For example, the accuracy of the next token:

    class Accuracy:
        name = "accuracy"

        def __init__(self, setting: Setting, held_out: HeldOut) -> None:
            self._setting, self._held_out = setting, held_out

        def due(self, tokens: int) -> bool:
            return self._setting.due(tokens)

        def run(self, model: LanguageModel) -> Metrics:
            def right(batch: Batch) -> Tensor:
                logits, _ = model(batch.tokens, batch.documents)  # [B, T, V]
                return (logits.argmax(-1) == batch.targets).sum()  # ignored targets are -100: never equal

            (right_sum,), targets = self._held_out.sums(model, right)
            return {"accuracy": right_sum / targets, "targets": targets}
"""

from collections.abc import Callable

from nltrain.evaluate.held_out import HeldOut
from nltrain.evaluate.protocol import Evaluation, Setting
from nltrain.evaluate.validation import Validation

EVALUATIONS: tuple[Callable[[Setting, HeldOut], Evaluation], ...] = (Validation,)
"""What makes each evaluation. Making one must be cheap: nothing is read before its first `run`."""


def make_evaluations(setting: Setting) -> list[Evaluation]:
    """The evaluations of a run; they share the held-out sequences."""
    held_out = HeldOut(setting)
    return [make(setting, held_out) for make in EVALUATIONS]
