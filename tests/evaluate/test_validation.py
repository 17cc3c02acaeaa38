"""The loss on held-out text is the mean over targets, however the sequences are cut."""

import math
from dataclasses import replace

import pytest
import torch

from nltrain.evaluate.held_out import HeldOut
from nltrain.evaluate.validation import Validation


def test_it_is_the_mean_over_targets_however_it_is_cut(setting, model):
    whole, cut = (
        Validation(each, HeldOut(each)).run(model) for each in (setting, replace(setting, micro_batch_size=3))
    )
    batches = HeldOut(setting).batches()
    with torch.no_grad():
        loss_sum = sum(model.loss(batch.tokens, batch.targets, batch.document_starts).item() for batch in batches)
    targets = sum(batch.num_targets for batch in batches)
    assert whole["targets"] == cut["targets"] == targets
    assert whole["loss"] == pytest.approx(loss_sum / targets, abs=1e-6)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
    assert 0 < whole["bigram_entropy"] < whole["unigram_entropy"] < math.log(300)


def test_entropies_are_counted_on_rank_0_and_for_small_text_only(setting, model, capsys):
    other = replace(setting, rank=1, world_size=2)
    assert Validation(other, HeldOut(other)).run(model)["unigram_entropy"] is None
    large = replace(setting, reference_max_tokens=10)
    assert Validation(large, HeldOut(large)).run(model)["bigram_entropy"] is None
    assert "more than train.reference_max_tokens=10" in capsys.readouterr().out
