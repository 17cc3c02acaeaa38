"""Another evaluation needs its class and its place in the registry, no more: here the accuracy of the next token."""

from nltrain.evaluate import registry
from nltrain.evaluate.registry import EVALUATIONS, make_evaluations


class Accuracy:
    """As in the docstring of the registry."""

    name = "accuracy"

    def __init__(self, setting, held_out):
        self._setting, self._held_out = setting, held_out

    def due(self, tokens):
        return self._setting.due(tokens)

    def run(self, model):
        def right(batch):
            logits, _ = model(batch.tokens, batch.document_starts)
            return (logits.argmax(-1) == batch.targets).sum()

        (right_sum,), targets = self._held_out.sums(model, right)
        return {"accuracy": right_sum / targets, "targets": targets}


def test_validation_is_always_there(setting):
    assert [evaluation.name for evaluation in make_evaluations(setting)] == ["validation"]


def test_another_evaluation_shares_the_held_out_sequences(setting, model, monkeypatch):
    monkeypatch.setattr(registry, "EVALUATIONS", (*EVALUATIONS, Accuracy))
    validation, accuracy = make_evaluations(setting)
    assert [each.name for each in (validation, accuracy) if each.due(1000)] == ["validation", "accuracy"]
    found, loss = accuracy.run(model), validation.run(model)
    assert found["targets"] == loss["targets"]
    assert 0 <= found["accuracy"] < 0.5
