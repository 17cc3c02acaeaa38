"""The evaluation named "validation": loss on held-out text, beside what counting alone achieves."""

import math

from nltrain.data import TokenDataset
from nltrain.evaluate.entropy import reference_entropies
from nltrain.evaluate.held_out import HeldOut
from nltrain.evaluate.protocol import Metrics, Setting
from nltrain.model import LanguageModel


class Validation:
    """Mean loss over the held-out targets of all ranks."""

    name = "validation"

    def __init__(self, setting: Setting, held_out: HeldOut) -> None:
        """Nothing is read or counted before the first `run`."""
        self._setting, self._held_out = setting, held_out
        self._entropies: dict[str, float | None] | None = None

    def due(self, tokens: int) -> bool:
        """Every `train.validate_every_tokens`, and at the end of the run."""
        return self._setting.due(tokens)

    def run(self, model: LanguageModel) -> Metrics:
        """loss [nats per token], perplexity, targets, and the two entropies [nats per token; None: not counted]."""
        self._held_out.batches()
        if self._entropies is None:
            self._entropies = self._count()
        (loss_sum,), targets = self._held_out.sums(
            model, lambda batch: model.loss(batch.tokens, batch.targets, batch.documents)
        )
        loss = loss_sum / targets
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "targets": targets} | self._entropies

    def _count(self) -> dict[str, float | None]:
        """Unigram and bigram entropies; counted on rank 0, which alone writes them down."""
        none: dict[str, float | None] = {"unigram_entropy": None, "bigram_entropy": None}
        if self._setting.rank != 0:
            return none
        prefix, limit = self._setting.data.prefixes[0], self._setting.reference_max_tokens
        train = TokenDataset.open(prefix, "train")
        if train.num_tokens > limit:
            print(
                f"unigram and bigram entropies are not counted: {train.num_tokens:,} training tokens are more than "
                f"train.reference_max_tokens={limit:,}",
                flush=True,
            )
            return none
        found = reference_entropies(train, TokenDataset.open(prefix, "validation"))
        return {"unigram_entropy": found.unigram_nats, "bigram_entropy": found.bigram_nats}
