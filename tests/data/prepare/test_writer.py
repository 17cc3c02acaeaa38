"""Documents that a program hands over: chosen by name alone, each name once."""

from pathlib import Path

import numpy as np
import pytest

from nltrain.data import DataError
from nltrain.data.prepare import PrepareConfig, prepare, prepare_tokens
from nltrain.store import open_store
from tests.data.support import TOKENIZER

TEXTS = [f"document {n}\n" + "some words in a row, " * (n % 17) + "é世界" * (n % 3) for n in range(90)]


def test_documents_are_held_out_and_sampled_by_name_alone(tmp_path: Path) -> None:
    documents = [(f"name {n}", text) for n, text in enumerate(TEXTS)]
    config = PrepareConfig(seq_len=32, validation_fraction=0.3, document_fraction=0.5)
    whole = prepare(documents, open_store(str(tmp_path / "a")), TOKENIZER, config)
    reordered = prepare(documents[::-1], open_store(str(tmp_path / "b")), TOKENIZER, config)
    kept = whole.report["documents_in"]
    assert 30 < kept < 60 and whole.report["documents_left_out"] == 90 - kept
    assert 5 < whole.splits["validation"].num_documents < 30
    for split in ("train", "validation"):
        assert whole.splits[split].num_tokens == reordered.splits[split].num_tokens
    assert prepare(documents, open_store(str(tmp_path / "a")), TOKENIZER, config) == whole  # finished already


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([("a", "x"), ("b", "y"), ("a", "z")], "documents: name 'a' occurs more than once: give each document its own"),
        ([("empty", "")], "the inputs hold no tokens .dropped: {'empty text': 1}"),
        ([], "the inputs hold no tokens"),
    ],
    ids=["a name twice", "no text", "none"],
)
def test_documents_that_make_no_dataset_are_refused(
    tmp_path: Path, documents: list[tuple[str, str]], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        prepare(documents, open_store(str(tmp_path)), TOKENIZER, PrepareConfig(seq_len=32))


@pytest.mark.parametrize("token", [-1, TOKENIZER.get_vocab_size()])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match=r"document 'b': an id is outside \[0, 277\): use its own tokenizer"):
        prepare_tokens(
            [("a", np.array([0, 276])), ("b", np.array([token]))], open_store(str(tmp_path)), TOKENIZER, PrepareConfig()
        )
