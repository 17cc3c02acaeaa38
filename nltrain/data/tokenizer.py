"""Train, load and apply a Hugging Face `tokenizers` tokenizer.

Text never becomes a control token: a document that spells `<|endoftext|>` is encoded as those characters, so the
separator marks document starts and nothing else.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nltrain.data.errors import DataError

SEPARATOR = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, the separator included; any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise DataError(f"vocab_size: {vocab_size}: at least {len(alphabet) + 1} is needed (256 bytes and a separator)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_to_bytes(tokenizer: Tokenizer) -> bytes:
    """Its tokenizer.json."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_from_bytes(data: bytes, source: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; `source` names it in the error."""
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{source}: not a Hugging Face tokenizer.json: {error}: give another file") from error


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Identity of a tokenizer: the hash of its JSON."""
    return hashlib.sha256(tokenizer_to_bytes(tokenizer)).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 while every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class DocumentEncoder:
    """Encodes documents, each led by the separator's id (if there is one)."""

    def __init__(self, tokenizer: Tokenizer, separator: str | None = SEPARATOR):
        # A private copy: two settings are changed.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.separator_id = None
        if separator is not None:
            self.separator_id = self._tokenizer.token_to_id(separator)
            if self.separator_id is None:
                raise DataError(
                    f"separator: {separator!r} is no token of this tokenizer: name one of its tokens or none"
                )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One 1-D int64 array of ids per text, separator first."""
        lead = [] if self.separator_id is None else [self.separator_id]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(lead + encoding.ids, dtype=np.int64) for encoding in encodings]
