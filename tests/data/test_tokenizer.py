"""Tokenizers: trained alike on equal texts; text never becomes a separator; a byte-level one leaves nothing out."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from nltrain.data import DataError, train_tokenizer
from nltrain.data.tokenizer import DocumentEncoder, token_dtype, tokenizer_from_bytes, tokenizer_to_bytes
from tests.data.support import TOKENIZER


def test_equal_texts_train_equal_tokenizers() -> None:
    texts = [f"word{n % 7} text {n}" for n in range(200)]
    trained = train_tokenizer(texts, 400)
    assert trained.get_vocab_size() <= 400
    assert tokenizer_to_bytes(train_tokenizer(iter(texts), 400)) == tokenizer_to_bytes(trained)
    assert tokenizer_to_bytes(tokenizer_from_bytes(tokenizer_to_bytes(trained), "t")) == tokenizer_to_bytes(trained)


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size: 256: at least 257 is needed"):
        train_tokenizer(["text"], 256)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint16), (65_536, np.uint16), (65_537, np.uint32)], ids=["small", "fits", "over"]
)
def test_a_token_takes_two_bytes_while_its_id_fits(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype and token_dtype(vocab_size).str[0] == "<"


def test_a_text_that_continues_a_document_gets_no_separator() -> None:
    encoder = DocumentEncoder(TOKENIZER)
    first, further = encoder.try_encode(["a b", "c"], [False, True])
    assert first[0] == encoder.separator_id and encoder.separator_id not in further
    assert TOKENIZER.decode(np.concatenate([first[1:], further]).tolist()) == "a bc"


def test_a_text_without_long_words_trains_the_tokenizer_that_it_always_did() -> None:
    texts = ["def f(x):\n        return x ** 2  # " + "-" * 200 + "\n", "é 世界" * 50 + " " * 256]
    tokenizer = Tokenizer.from_str(train_tokenizer(texts, 400).to_str())
    again = train_tokenizer(texts, 400, report_cut=lambda _: pytest.fail("nothing is to be cut"))
    assert tokenizer.to_str() == again.to_str()


def test_a_text_that_spells_the_separator_does_not_become_one() -> None:
    encoder = DocumentEncoder(TOKENIZER)
    ids = encoder.encode(["a <|endoftext|> b"])[0]
    assert (ids == encoder.separator_id).sum() == 1 and ids[0] == encoder.separator_id
    with pytest.raises(DataError, match=r"separator: '<s>' is no token"):
        DocumentEncoder(TOKENIZER, "<s>")


def test_a_byte_level_tokenizer_leaves_nothing_out() -> None:
    encoder = DocumentEncoder(TOKENIZER)
    text = "\0\x01é世\U0010ffff\u0378 \ue000"
    assert TOKENIZER.decode(encoder.encode([text])[0][1:].tolist()) == text
    assert not encoder.unencoded.characters and not encoder.unencoded.num_unknown
