"""From documents to a dataset: tokenise, pack, store shards and indexes; the manifest last.

Guarantees: no token is lost or doubled (tokens in == tokens out, checked and reported). Equal documents and settings
give equal bytes on any number of workers, because groups of documents are fixed beforehand and packed independently. A
hash of its name decides the split of a document. Limits: one group is one worker's task.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nltrain.data.errors import DataError
from nltrain.data.hashing import unit_hash
from nltrain.data.manifest import MANIFEST_KEY, TOKENIZER_KEY, Manifest, Split, read_manifest
from nltrain.data.prepare.config import PrepareConfig
from nltrain.data.prepare.corpus import Document
from nltrain.data.prepare.inputs import EXAMPLES_KEPT, PassedOver, Progress
from nltrain.data.prepare.sources import Dropped, Passage, passages
from nltrain.data.shards import FinishedShard, Shard, ShardPacker
from nltrain.data.tokenizer import DocumentEncoder, Unencoded, token_dtype, tokenizer_sha256, tokenizer_to_bytes
from nltrain.store import Store
from nltrain.store.places import join_url

TRAIN, VALIDATION = "train", "validation"
# Characters given to the tokenizer at once, which encodes their documents on threads of its own.
ENCODE_BATCH_CHARS = 1 << 20
LOST_CHARACTERS_KEPT = 50


@dataclass(frozen=True)
class GroupResult:
    """What preparing one group gave: its shards and counts. A receipt stores it."""

    shards: dict[str, list[Shard]]
    num_documents: int
    num_tokens: int
    num_left_out: int
    """Documents left out by document_fraction."""
    num_records: int
    dropped: dict[str, int]
    """Records that gave no tokens, by reason."""
    dropped_examples: list[str]
    """The first of them, as file:line: reason."""
    no_records: list[str] = field(default_factory=list)
    """Names of JSON files without records."""
    lost_characters: dict[str, int] = field(default_factory=dict)
    """How often each character without a token was left out of kept documents."""
    num_unknown: int = 0
    """Unknown tokens among `num_tokens`."""

    def to_bytes(self, work: str) -> bytes:
        """The receipt: JSON of the result and of the `work_key` that it belongs to."""
        return json.dumps({"work": work, **asdict(self)}, sort_keys=True).encode()

    @classmethod
    def parse(cls, data: bytes, work: str) -> "GroupResult | None":
        """The result that a receipt stores; None when the receipt belongs to other work."""
        content = json.loads(data)
        if content.pop("work", None) != work:
            return None
        content["shards"] = {split: [Shard(**shard) for shard in shards] for split, shards in content["shards"].items()}
        return cls(**content)


def prepare(
    documents: Iterable[tuple[str, str]],
    store: Store,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    progress: Progress | None = None,
) -> Manifest:
    """Makes a dataset of documents (name, text) held in memory, as one group; returns its manifest.

    Returns the existing manifest when the same dataset is there already. Raises DataError when another dataset is
    there, or a name occurs twice.
    """
    corpus = [Document(*document) for document in documents]
    repeated = [name for name, count in Counter(name for name, _ in corpus).items() if count > 1]
    if repeated:
        raise DataError(f"documents: name {repeated[0]!r} occurs more than once: give each document its own name")
    content = hashlib.sha256()
    for name, text in corpus:
        content.update(f"{len(name)} {len(text)} {name}{text}".encode("utf-8", errors="surrogatepass"))
    work = work_key(config, tokenizer, content.hexdigest())
    finished = finished_manifest(store, work)
    if finished is not None:
        return finished
    dropped = Dropped()
    dropped.num_records = len(corpus)
    for name, text in corpus:
        if not text:
            dropped.add(name, "empty text")
    texts = (passage for name, text in corpus if text for passage in passages(name, name, [text]))
    result = prepare_group(0, texts, store, tokenizer, config, dropped, progress)
    return write_manifest(store, tokenizer, config, work, [result])


def settings_that_matter(config: PrepareConfig) -> dict[str, Any]:
    """The settings on which the bytes written depend."""
    settings = asdict(config)
    del settings["max_bad_fraction"]  # a higher limit must keep what is done
    if settings["max_record_bytes"] == PrepareConfig.max_record_bytes:
        del settings["max_record_bytes"]  # so that datasets made before this setting keep their identity
    return settings


def work_key(config: PrepareConfig, tokenizer: Tokenizer, inputs: str) -> str:
    """SHA-256 over settings, tokenizer and inputs: equal keys mean equal output."""
    identity = json.dumps([settings_that_matter(config), tokenizer_sha256(tokenizer), inputs], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def finished_manifest(store: Store, work: str) -> Manifest | None:
    """The manifest if this work is finished, None if nothing is there. Raises DataError for another dataset."""
    if not store.exists(MANIFEST_KEY):
        return None
    manifest = read_manifest(store)
    if manifest.report.get("work") != work:
        raise DataError(
            f"{join_url(store.url, MANIFEST_KEY)}: another dataset (other inputs, settings or tokenizer) is there: "
            "choose another prefix, or delete this one first"
        )
    return manifest


def prepare_tokens(
    documents: Iterable[tuple[str, np.ndarray]], store: Store, tokenizer: Tokenizer, config: PrepareConfig
) -> Manifest:
    """Makes a dataset of documents (name, ids) that were tokenised elsewhere with `tokenizer`, as one group.

    The ids are stored as they are: no separator is added. Raises DataError when a dataset lies at the store's prefix.
    """
    work = work_key(config, tokenizer, "tokens")
    finished = finished_manifest(store, work)
    if finished is not None:
        raise DataError(f"{join_url(store.url, MANIFEST_KEY)}: a dataset is there: choose another prefix")
    packer = GroupPacker(0, store, DocumentEncoder(tokenizer, config.separator).vocab_size, config)
    for name, tokens in documents:
        packer.add(name, tokens)
    return write_manifest(store, tokenizer, config, work, [packer.finish(Dropped())])


def prepare_group(
    group: int,
    documents: Iterable[Passage],
    store: Store,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    dropped: Dropped,
    progress: Progress | None = None,
) -> GroupResult:
    """Packs and stores one group of documents, none of them empty.

    Adds records that cannot be encoded to `dropped`, to which the reader of `documents` adds the other bad ones.
    """
    encoder = DocumentEncoder(tokenizer, config.separator)
    packer = GroupPacker(group, store, encoder.vocab_size, config, progress)
    for batch in _batches(documents, packer):
        encoded = encoder.try_encode([passage.text for passage in batch], [passage.continues for passage in batch])
        for passage, tokens in zip(batch, encoded, strict=True):
            if isinstance(tokens, str) or not len(tokens):
                why = tokens if isinstance(tokens, str) else "no token for any of its characters"
                dropped.add(passage.where, f"{why}, in a part of a long document" if passage.continues else why)
                dropped.check()
            else:
                packer.add(passage.name, tokens, passage.continues)
    return packer.finish(dropped, encoder.unencoded)


class GroupPacker:
    """Packs the documents of one group into the shards of their splits and stores each shard as it becomes full."""

    def __init__(
        self, group: int, store: Store, vocab_size: int, config: PrepareConfig, progress: Progress | None = None
    ):
        self.group, self.store, self.vocab_size, self.config, self.progress = group, store, vocab_size, config, progress
        dtype, sizes = token_dtype(vocab_size), (config.bytes_per_member, config.bytes_per_shard)
        self._packers = {
            split: ShardPacker(f"{split}/{group:05d}", config.seq_len, dtype, *sizes) for split in (TRAIN, VALIDATION)
        }
        self._shards: dict[str, list[Shard]] = {split: [] for split in self._packers}
        self._num_documents = self._num_tokens = self._num_left_out = 0
        self._name: str | None = None  # of the document added last
        self._started_s = time.monotonic()

    def keeps(self, name: str) -> bool:
        """Whether document_fraction keeps the document; counts it when not."""
        if unit_hash(self.config.seed, "keep", name) < self.config.document_fraction:
            return True
        self._num_left_out += 1
        return False

    def add(self, name: str, tokens: np.ndarray, continues: bool = False) -> None:
        """Appends a document or the next passage of the last one. Raises DataError for an id outside the vocabulary."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(f"document {name!r}: an id is outside [0, {self.vocab_size}): use its own tokenizer")
        held_out = unit_hash(self.config.seed, "hold out", name) < self.config.validation_fraction
        split = VALIDATION if held_out else TRAIN
        # The first passage that could be encoded begins the document.
        starts = not continues or name != self._name
        self._name = name
        self._num_documents += starts
        self._num_tokens += len(tokens)
        self._store(split, self._packers[split].add(tokens, starts))

    def finish(self, dropped: Dropped, unencoded: Unencoded | None = None) -> GroupResult:
        """Stores the last shards, checks that no token was lost, and returns the result."""
        for split, packer in self._packers.items():
            self._store(split, packer.finish())
        packed = sum(shard.num_tokens for shards in self._shards.values() for shard in shards)
        if packed != self._num_tokens:
            raise AssertionError(f"group {self.group}: {self._num_tokens} tokens went in, {packed} came out")
        return GroupResult(
            self._shards,
            self._num_documents,
            self._num_tokens,
            self._num_left_out,
            dropped.num_records,
            dict(sorted(dropped.by_reason.items())),
            dropped.examples,
            dropped.no_records,
            dict(unencoded.characters.most_common(LOST_CHARACTERS_KEPT)) if unencoded else {},
            unencoded.num_unknown if unencoded else 0,
        )

    def _store(self, split: str, finished: list[FinishedShard]) -> None:
        for shard, data, index_data in finished:
            self.store.put(shard.key, data)
            self.store.put(shard.index_key, index_data)
            self._shards[split].append(shard)
            if self.progress is not None:
                rate = self._num_tokens / max(1e-9, time.monotonic() - self._started_s)
                counts = f"{self._num_documents} documents, {self._num_tokens} tokens"
                self.progress(f"{shard.key}: {counts}, {rate:.0f} tokens/s")


def write_manifest(
    store: Store,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    work: str,
    results: list[GroupResult],
    passed_over: PassedOver | None = None,
) -> Manifest:
    """Sums up the groups, in order, and writes the manifest. Raises DataError when the dataset would hold no token."""
    encoder = DocumentEncoder(tokenizer, config.separator)
    splits = {
        split: Split(tuple(shard for result in results for shard in result.shards[split]))
        for split in (TRAIN, VALIDATION)
    }
    dropped: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for result in results:
        dropped.update(result.dropped)
        lost.update(result.lost_characters)
    passed_over = passed_over or PassedOver()
    report: dict[str, Any] = {
        "work": work,
        "settings": asdict(config),
        "documents_in": sum(result.num_documents for result in results),
        "documents_left_out": sum(result.num_left_out for result in results),
        "tokens_in": sum(result.num_tokens for result in results),
        "tokens_out": sum(split.num_tokens for split in splits.values()),
        "records_in": sum(result.num_records for result in results),
        "dropped_records": dict(sorted(dropped.items())),
        "dropped_examples": [example for result in results for example in result.dropped_examples][:EXAMPLES_KEPT],
        "passed_over": dict(sorted(passed_over.by_reason.items())),
        "passed_over_examples": {reason: list(names) for reason, names in sorted(passed_over.examples.items())},
        "unknown_tokens": sum(result.num_unknown for result in results),
        "characters_without_token": dict(lost.most_common(LOST_CHARACTERS_KEPT)),
    }
    if not report["tokens_out"]:
        raise DataError(
            f"{store.url}: the inputs hold no tokens (dropped: {report['dropped_records']}, passed over: "
            f"{report['passed_over']}): check them and prepare.text_field"
        )
    manifest = Manifest(
        seq_len=config.seq_len,
        dtype=token_dtype(encoder.vocab_size).name,
        vocab_size=encoder.vocab_size,
        separator_id=encoder.separator_id,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        splits=splits,
        report=report,
    )
    store.put(TOKENIZER_KEY, tokenizer_to_bytes(tokenizer))
    store.put(MANIFEST_KEY, manifest.to_bytes())
    return manifest


def _batches(documents: Iterable[Passage], packer: GroupPacker) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    num_chars, kept = 0, False
    for passage in documents:
        if not passage.continues:
            kept = packer.keeps(passage.name)
        if not kept:
            continue
        batch.append(passage)
        num_chars += len(passage.text)
        if num_chars >= ENCODE_BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
