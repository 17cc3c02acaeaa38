"""Prepare a dataset from files: the same work, cut into tasks that any number of workers can take.

Guarantees: the bytes written depend on the inputs and settings alone, not on the number of workers or on kills; each
finished group leaves a receipt, so that a run started again does the rest; the manifest comes last. Limits: once the
manifest is there, an input whose content changes at the same size is not noticed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from nltrain.data.hashing import key64
from nltrain.data.manifest import Manifest
from nltrain.data.prepare import (
    GroupResult,
    PrepareConfig,
    Progress,
    finished_manifest,
    prepare_group,
    work_key,
    write_manifest,
)
from nltrain.data.sources import Dropped, InputFile, cut_groups, list_inputs, read_documents
from nltrain.data.store import MissingObjectError, Store, join_url, open_store
from nltrain.data.tokenizer import (
    Tokenizer,
    tokenizer_from_bytes,
    tokenizer_sha256,
    tokenizer_to_bytes,
    train_tokenizer,
)

RECEIPTS = "groups"
TRAINING_FILES = 64


@dataclass(frozen=True)
class GroupTask:
    """What one worker needs to do one group; plain data, so that it travels."""

    group: int
    files: tuple[InputFile, ...]
    output: str
    tokenizer_key: str
    """Where in the output the tokenizer lies."""
    config: PrepareConfig
    work: str

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


Execute = Callable[[Callable[[GroupTask], GroupResult], Sequence[GroupTask]], Iterable[tuple[int, GroupResult]]]


def in_turn(run: Callable[[GroupTask], GroupResult], tasks: Sequence[GroupTask]) -> Iterable[tuple[int, GroupResult]]:
    """Does the tasks in this process, one after the other; yields (position, result)."""
    for position, task in enumerate(tasks):
        yield position, run(task)


def run_group(task: GroupTask) -> GroupResult:
    """Does one group and leaves its receipt, or returns the receipt of an earlier run."""
    store = open_store(task.output)
    found = _receipt(store, task)
    if found is not None:
        return found
    tokenizer = tokenizer_from_bytes(store.get(task.tokenizer_key), join_url(store.url, task.tokenizer_key))
    dropped = Dropped(task.config.max_bad_fraction)
    documents = read_documents(task.files, task.config.text_field, dropped)
    result = prepare_group(task.group, documents, store, tokenizer, task.config, dropped)
    store.put(_receipt_key(task.group), result.to_bytes(task.work))
    return result


def prepare_files(
    inputs: Sequence[str],
    output: str,
    config: PrepareConfig,
    tokenizer: str = "",
    vocab_size: int = 32768,
    tokenizer_training_bytes: int = 64 << 20,
    execute: Execute = in_turn,
    progress: Progress = print,
) -> Manifest:
    """Prepares the dataset at `output` from files, folders or s3:// prefixes; returns its manifest.

    tokenizer: URL of a Hugging Face tokenizer.json; empty: one of vocab_size tokens is trained on a sample of
    tokenizer_training_bytes. Raises DataError or StoreError in one line.
    """
    store = open_store(output)
    files = list_inputs(inputs, progress)
    total_bytes = sum(file.num_bytes for file in files)
    groups = cut_groups(files, config.group_bytes)
    progress(f"{len(files)} files, {total_bytes / 1e6:.1f} MB, {len(groups)} groups -> {store.url}")
    loaded = _tokenizer(store, files, config, tokenizer, vocab_size, tokenizer_training_bytes, progress)
    work = work_key(config, loaded, _listing(files))
    finished = finished_manifest(store, work)
    if finished is not None:
        progress(f"{store.url}: finished already")
        return finished
    # Workers fetch it themselves: it may be megabytes, and there may be thousands of tasks.
    tokenizer_key = f"{RECEIPTS}/tokenizer-{tokenizer_sha256(loaded)[:16]}.json"
    store.put(tokenizer_key, tokenizer_to_bytes(loaded))
    tasks = [
        GroupTask(number, tuple(group), output, tokenizer_key, config, work_key(config, loaded, _state(group)))
        for number, group in enumerate(groups)
    ]
    results: dict[int, GroupResult] = {}
    started_s, done_bytes, num_tokens = time.monotonic(), 0, 0
    for position, result in execute(run_group, tasks):
        results[position] = result
        done_bytes += tasks[position].num_bytes
        num_tokens += result.num_tokens
        elapsed_s = max(1e-9, time.monotonic() - started_s)
        eta_s = elapsed_s * (total_bytes - done_bytes) / max(1, done_bytes)
        for example in result.dropped_examples:
            progress(f"dropped: {example}")
        progress(
            f"{len(results)}/{len(tasks)} groups, {num_tokens} tokens, {num_tokens / elapsed_s:.0f} tokens/s, "
            f"{sum(result.dropped.values())} dropped, ETA {eta_s:.0f} s"
        )
    manifest = write_manifest(store, loaded, config, work, [results[position] for position in range(len(tasks))])
    _forget_receipts(store)
    return manifest


def _tokenizer(
    store: Store,
    files: Sequence[InputFile],
    config: PrepareConfig,
    tokenizer: str,
    vocab_size: int,
    training_bytes: int,
    progress: Progress,
) -> Tokenizer:
    """The named tokenizer, or one trained on the spot and kept, so that a run started again uses the same."""
    if tokenizer:
        folder, _, name = tokenizer.rpartition("/")
        return tokenizer_from_bytes(open_store(folder or ".").get(name), tokenizer)
    identity = json.dumps([_listing(files), asdict(config), vocab_size, training_bytes], sort_keys=True)
    key = f"tokenizers/{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        return tokenizer_from_bytes(store.get(key), key)
    except MissingObjectError:
        pass
    progress(f"training a tokenizer of {vocab_size} tokens")
    texts = _training_texts(files, config, training_bytes)
    trained = train_tokenizer(texts, vocab_size)
    data = tokenizer_to_bytes(trained)
    # Two runs at once agree on the one that came first.
    return trained if store.put_if_absent(key, data) else tokenizer_from_bytes(store.get(key), key)


def _training_texts(files: Sequence[InputFile], config: PrepareConfig, training_bytes: int) -> Iterable[str]:
    """The beginnings of some files, drawn by a hash of their names."""
    drawn = sorted(files, key=lambda file: (key64(config.seed, "tokenizer", file.name), file.name))
    share = training_bytes // min(len(drawn), TRAINING_FILES)
    num_bytes = 0
    for file in drawn:
        if num_bytes >= training_bytes:
            return
        from_file = 0
        for document in read_documents([file], config.text_field, Dropped(config.max_bad_fraction)):
            yield document.text
            from_file += len(document.text.encode())
            if from_file >= share:
                break
        num_bytes += from_file


def _listing(files: Sequence[InputFile]) -> str:
    return json.dumps([[file.name, file.num_bytes] for file in files])


def _state(files: Sequence[InputFile]) -> str:
    """What a receipt vouches for: a file written anew since is read again."""
    return json.dumps([[file.name, file.num_bytes, file.modified_s] for file in files])


def _receipt_key(group: int) -> str:
    return f"{RECEIPTS}/{group:05d}.json"


def _receipt(store: Store, task: GroupTask) -> GroupResult | None:
    try:
        data = store.get(_receipt_key(task.group))
    except MissingObjectError:
        return None
    return GroupResult.parse(data, task.work)


def _forget_receipts(store: Store) -> None:
    for found in store.list(f"{RECEIPTS}/"):
        store.delete(found.key)
