"""Train, load and apply a Hugging Face `tokenizers` tokenizer.

Text never becomes a control token: a document that spells `<|endoftext|>` is encoded as those characters, so only
document starts have the separator. A text that a tokenizer cannot encode is reported; characters that it leaves out are
counted.
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
# Training reads the whole word again for each merge, so a word of a megabyte takes minutes. Real words are shorter.
LONGEST_WORD_CHARS = 256
_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
_SPACES = re.compile(r"\s{2,}")
# Few tokenizers have a token for all of these. Leaving one out shows that a tokenizer may leave out others.
RARE_CHARACTERS = ("\U0010ffff", "\ue000", "\u0378", "\u4e16", "\u00e9", "Q", "\x01")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, report_cut: Callable[[int], None] | None = None
) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, the separator included; any text can be encoded.

    Only the first LONGEST_WORD_CHARS of an unbroken run of letters, digits, spaces or signs are used; report_cut is
    called with the number of characters that were left out of a text. Raises DataError for a vocab_size below 257.
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
        # Most texts have no long run; this check is faster than cutting.
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
    """The tokenizer.json of a tokenizer."""
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_from_bytes(data: bytes, source: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises DataError, which names it by `source`."""
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
class Unencoded:
    """What encoding could not represent of documents that were kept."""

    characters: Counter[str] = field(default_factory=Counter)
    """How often each character without a token was left out; white space is not counted."""
    num_unknown: int = 0
    """Unknown tokens, each in place of a word or character that the vocabulary lacks."""


class DocumentEncoder:
    """Encodes documents, each with the separator's id (if there is one) first. `unencoded` counts what was left out."""

    def __init__(self, tokenizer: Tokenizer, separator: str | None = SEPARATOR):
        # A private copy, because settings are changed.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.unencoded = Unencoded()
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
        self._tested: set[str] = set()
        self._without_token: set[str] = set()
        self._leaves_out = any(self._encode_one(c) == [] for c in RARE_CHARACTERS)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One 1-D int64 array of ids per text, separator first. Raises DataError for what cannot be encoded."""
        found = []
        for tokens in self.try_encode(texts, [False] * len(texts)):
            if isinstance(tokens, str):
                raise DataError(f"tokenizer: a text cannot be encoded: {tokens}")
            found.append(tokens)
        return found

    def try_encode(self, texts: Sequence[str], continues: Sequence[bool]) -> list[np.ndarray | str]:
        """One 1-D int64 array of ids per text, or the reason why it cannot be encoded.

        continues: whether a text continues the document of the text before; such a text gets no separator.
        """
        ids: list[list[int] | str]
        try:
            ids = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            _reason(error)
            ids = [self._encode_one(text) for text in texts]
        lead = [] if self.separator_id is None else [self.separator_id]
        return [
            found if isinstance(found, str) else self._counted(text, [] if continued else lead, found)
            for text, continued, found in zip(texts, continues, ids, strict=True)
        ]

    def _counted(self, text: str, lead: list[int], ids: list[int]) -> np.ndarray:
        tokens = np.array(lead + ids, dtype=np.int64)
        if self._unknown_id is not None:
            self.unencoded.num_unknown += int(np.count_nonzero(tokens[len(lead) :] == self._unknown_id))
        if self._leaves_out:
            characters = set(text)
            for c in characters - self._tested:
                self._tested.add(c)
                if not c.isspace() and self._encode_one(c) == []:
                    self._without_token.add(c)
            for c in characters & self._without_token:
                self.unencoded.characters[c] += text.count(c)
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
    """The reason in the library's words; raises errors that are not about the text."""
    # The library's panics do not derive from Exception.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    if isinstance(error, MemoryError):
        raise error
    return f"the tokenizer cannot encode it ({' '.join(str(error).split())[:120]})"
