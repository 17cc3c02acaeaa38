"""What the tests of preparing share: a folder with a corpus, prepared with a known tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from nltrain.data import Manifest, TokenDataset
from nltrain.data.prepare import PrepareConfig, prepare_files
from nltrain.data.tokenizer import tokenizer_to_bytes
from tests.data.support import TOKENIZER

ROOT = Path(__file__).resolve().parents[3]
CONFIG = PrepareConfig(seq_len=32, group_bytes=3000, validation_fraction=0.0)


class Prepared(NamedTuple):
    """A dataset and the log of preparing it."""

    manifest: Manifest
    lines: list[str]

    @property
    def report(self) -> dict[str, Any]:
        """The manifest's report."""
        return self.manifest.report


def run(
    corpus: Path | str,
    config: PrepareConfig = CONFIG,
    *,
    tokenizer: Tokenizer | None = TOKENIZER,
    output: Path | str = "",
    lines: list[str] | None = None,
    **options: Any,
) -> Prepared:
    """Prepares the corpus; the output, a tokenizer.json and nothing else appear beside it. None: trains a tokenizer."""
    lines = [] if lines is None else lines
    output = output or Path(corpus).parent / "out"
    if tokenizer is not None:
        path = Path(corpus).parent / "tokenizer.json"
        path.write_bytes(tokenizer_to_bytes(tokenizer))
        options["tokenizer"] = str(path)
    return Prepared(prepare_files([str(corpus)], str(output), config, progress=lines.append, **options), lines)


def documents_of(url: Path | str, splits: tuple[str, ...] = ("train",)) -> list[str]:
    """The documents of these splits as text, in stored order, cut at their stored starts."""
    found = []
    for split in splits:
        dataset = TokenDataset.open(str(url), split)
        groups: dict[str, tuple[list[int], list[int]]] = {}
        sequences = dataset.sequences()
        for shard in dataset.shards:
            tokens, starts = groups.setdefault(shard.key.rpartition("-")[0], ([], []))
            for _ in range(shard.num_sequences):
                sequence = next(sequences)
                if tokens:
                    tokens.pop()  # the overlap
                starts += [len(tokens) + int(start) for start in sequence.starts]
                tokens += sequence.tokens[: sequence.num_targets + 1].tolist()
        for tokens, starts in groups.values():
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                assert tokens[start] == dataset.manifest.separator_id
                found.append(dataset.tokenizer().decode(tokens[start + 1 : end]))
    return found
