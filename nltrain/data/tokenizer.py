"""Train, load and apply a Hugging Face `tokenizers` tokenizer.

Text never becomes a control token: a document that spells `<|endoftext|>` is encoded as those characters, so the
separator marks document starts and nothing else. What a tokenizer cannot encode is told, what it leaves out counted.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nltrain.data.errors import DataError

SEPARATOR = "<|endoftext|>"
# Merging tokens in one word of a megabyte costs a megabyte for each merge; no word of a language is as long as this.
LONGEST_WORD_CHARS = 256
_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_SPACES = re.compile(r"\s{2,}")
# Characters that few tokenizers have a token for: those that leave one of them out are watched.
RARE_CHARACTERS = ("\U0010ffff", "\ue000", "\u0378", "\u4e16", "\u00e9", "Q", "\x01")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, report_cut: Callable[[int], None] | None = None
) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, the separator included; any text can be encoded.

    Of a run of more than LONGEST_WORD_CHARS letters, digits, spaces or signs only the beginning is trained on;
    report_cut is told how many characters of a text were left out.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise DataError(f"vocab_size: {vocab_size}: at least {len(alphabet) + 1} is needed (256 bytes and a separator)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_without_long_words(texts, report_cut), trainer)
    return tokenizer


def _without_long_words(texts: Iterable[str], report_cut: Callable[[int], None] | None) -> Iterator[str]:
    for text in texts:
        # Most texts have none, which is seen faster than runs are told apart.
        short = max(map(len, text.split()), default=0) <= LONGEST_WORD_CHARS
        if short and all(
            end - start <= LONGEST_WORD_CHARS for start, end in map(re.Match.span, _SPACES.finditer(text))
        ):
            yield text
            continue
        kept = "".join(found[0][:LONGEST_WORD_CHARS] for found in _RUNS.finditer(text))
        if report_cut is not None and len(kept) < len(text):
            report_cut(len(text) - len(kept))
        yield kept


def tokenizer_to_bytes(tokenizer: Tokenizer) -> bytes:
    """Its tokenizer.json."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_from_bytes(data: bytes, source: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; `source` names it in the error."""
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        said = " ".join(str(error).split())
        raise DataError(f"{source}: not a Hugging Face tokenizer.json: {said}: give another file") from error


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Identity of a tokenizer: the hash of its JSON."""
    return hashlib.sha256(tokenizer_to_bytes(tokenizer)).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 while every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass
class Losses:
    """What encoding left out of documents that were kept."""

    characters: Counter[str] = field(default_factory=Counter)
    """Characters without a token, other than spaces: no token stands in their place."""
    num_unknown: int = 0
    """Unknown tokens: each stands for a word or character that the vocabulary lacks."""


class DocumentEncoder:
    """Encodes documents, each led by the separator's id (if there is one). `losses` counts what was left out."""

    def __init__(self, tokenizer: Tokenizer, separator: str | None = SEPARATOR):
        # A private copy: two settings are changed.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.losses = Losses()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise DataError("tokenizer: it has no tokens at all: train it first, or give another file")
        self.vocab_size = max(ids) + 1
        self.separator_id = None
        if separator is not None:
            self.separator_id = self._tokenizer.token_to_id(separator)
            if self.separator_id is None:
                added = self._tokenizer.get_added_tokens_decoder().values()
                special = ", ".join(repr(token.content) for token in added if token.special)
                raise DataError(
                    f"separator: {separator!r} is no token of this tokenizer (it has {special or 'no special ones'}): "
                    "set prepare.separator to one of its tokens or none"
                )
        self._unknown_id = self._find_unknown()
        self._known: set[str] = set()
        self._lost: set[str] = set()
        self._loses = any(self._encode_one(c) == [] for c in RARE_CHARACTERS)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One 1-D int64 array of ids per text, separator first. Raises DataError for what cannot be encoded."""
        found = []
        for tokens in self.try_encode(texts, [False] * len(texts)):
            if isinstance(tokens, str):
                raise DataError(f"tokenizer: a text cannot be encoded: {tokens}")
            found.append(tokens)
        return found

    def try_encode(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray | str]:
        """One 1-D int64 array of ids per text, or why there is none. No separator leads a text that continues another.

        The usual reason is a vocabulary without a token for what it does not know.
        """
        ids: list[list[int] | str]
        try:
            ids = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            _reason(error)
            ids = [self._encode_one(text) for text in texts]
        lead = [] if self.separator_id is None else [self.separator_id]
        return [
            found if isinstance(found, str) else self._counted(text, [] if further else lead, found)
            for text, further, found in zip(texts, continues, ids, strict=True)
        ]

    def _counted(self, text: str, lead: list[int], ids: list[int]) -> np.ndarray:
        tokens = np.array(lead + ids, dtype=np.int64)
        if self._unknown_id is not None:
            self.losses.num_unknown += int(np.count_nonzero(tokens[len(lead) :] == self._unknown_id))
        if self._loses:
            characters = set(text)
            for c in characters - self._known:
                self._known.add(c)
                if not c.isspace() and self._encode_one(c) == []:
                    self._lost.add(c)
            for c in characters & self._lost:
                self.losses.characters[c] += text.count(c)
        return tokens

    def _encode_one(self, text: str) -> list[int] | str:
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            return _reason(error)

    def _find_unknown(self) -> int | None:
        model = json.loads(self._tokenizer.to_str())["model"]
        if model.get("unk_token"):
            return self._tokenizer.token_to_id(model["unk_token"])
        return model.get("unk_id")


def _reason(error: BaseException) -> str:
    """What the library says; raises what is not about the text. Its panics are no Exceptions."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    if isinstance(error, MemoryError):
        raise error
    return f"the tokenizer cannot encode it ({' '.join(str(error).split())[:120]})"
