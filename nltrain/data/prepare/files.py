"""Prepares a dataset from files, in tasks that any number of workers can share.

Guarantees: the bytes written depend only on the inputs and settings, not on the number of workers or on kills. Each
finished group leaves a receipt, so the same command, started again, does only the rest. The manifest is written last.
Limits: once the manifest exists, a change of an input that keeps its size is not noticed.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nltrain.data.errors import DataError
from nltrain.data.hashing import key64
from nltrain.data.manifest import Manifest
from nltrain.data.prepare.config import PrepareConfig
from nltrain.data.prepare.inputs import InputFile, PassedOver, Progress, cut_groups, list_inputs, most_good_records
from nltrain.data.prepare.sources import Dropped, read_documents
from nltrain.data.prepare.writer import (
    GroupResult,
    finished_manifest,
    prepare_group,
    settings_that_matter,
    work_key,
    write_manifest,
)
from nltrain.data.tokenizer import (
    LONGEST_WORD_CHARS,
    Tokenizer,
    tokenizer_from_bytes,
    tokenizer_sha256,
    tokenizer_to_bytes,
    train_tokenizer,
)
from nltrain.store import MissingObjectError, Store, open_store
from nltrain.store.places import S3Place, absolute_place, join_url, parse_place, shown

RECEIPTS = "groups"
TRAINING_FILES = 64


@dataclass(frozen=True)
class GroupTask:
    """What a worker needs to prepare one group; plain data that can be sent to another process."""

    group: int
    files: tuple[InputFile, ...]
    output: str
    tokenizer_key: str
    """Key of the tokenizer in the output."""
    config: PrepareConfig
    work: str
    """`work_key` of the group; a receipt with another one is not used."""
    max_bad: int | None = None
    """Limit of bad records in the whole input; None: not known before all of it is read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the group's files, as stored."""
        return sum(file.num_bytes for file in self.files)


Execute = Callable[[Callable[[GroupTask], GroupResult], Sequence[GroupTask]], Iterable[tuple[int, GroupResult]]]


def in_turn(run: Callable[[GroupTask], GroupResult], tasks: Sequence[GroupTask]) -> Iterable[tuple[int, GroupResult]]:
    """Runs the tasks in this process, one after the other; yields (position, result)."""
    for position, task in enumerate(tasks):
        yield position, run(task)


def run_group(task: GroupTask) -> GroupResult:
    """Prepares one group and stores its receipt; returns the result of an earlier run if that left one."""
    store = open_store(task.output)
    found = _receipt(store, task)
    if found is not None:
        return found
    tokenizer = tokenizer_from_bytes(store.get(task.tokenizer_key), join_url(store.url, task.tokenizer_key))
    dropped = Dropped(task.max_bad, task.config.max_bad_fraction)
    documents = read_documents(task.files, task.config.text_field, dropped, task.config.max_record_bytes)
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
    tokenizer_training_bytes. execute: runs the tasks. progress: takes each line of the log. Raises DataError,
    StoreError or PlaceError in one line.
    """
    output = absolute_place("output", output)
    store = open_store(output)
    passed_over = PassedOver()
    files = list_inputs(inputs, progress, passed_over, not_read=(output, absolute_place("tokenizer", tokenizer)))
    total_bytes = sum(file.num_bytes for file in files)
    groups = cut_groups(files, config.group_bytes)
    progress(f"{len(files)} files, {total_bytes / 1e6:.1f} MB, {len(groups)} groups -> {shown(store.url)}")
    loaded = _tokenizer(store, files, config, tokenizer, vocab_size, tokenizer_training_bytes, progress)
    work = work_key(config, loaded, _listing(files))
    finished = finished_manifest(store, work)
    if finished is not None:
        progress(f"{shown(store.url)}: finished already")
        return finished
    # Workers read it from the store: a tokenizer of megabytes is too large to be part of thousands of tasks.
    tokenizer_key = f"{RECEIPTS}/tokenizer-{tokenizer_sha256(loaded)[:16]}.json"
    store.put(tokenizer_key, tokenizer_to_bytes(loaded))
    max_bad = _max_bad(files, config)
    tasks = [
        GroupTask(number, tuple(group), output, tokenizer_key, config, work_key(config, loaded, _state(group)), max_bad)
        for number, group in enumerate(groups)
    ]
    results = _execute_all(execute, tasks, progress)
    _check_bad(results, config)
    for result in results:
        for name in result.no_records:
            passed_over.add(name, "JSON without records")
    manifest = write_manifest(store, loaded, config, work, results, passed_over)
    _report_unencoded(manifest, progress)
    _forget_receipts(store)
    return manifest


def _execute_all(execute: Execute, tasks: Sequence[GroupTask], progress: Progress) -> list[GroupResult]:
    """The results, in the order of the tasks; logs each as it arrives."""
    results: dict[int, GroupResult] = {}
    total_bytes = sum(task.num_bytes for task in tasks)
    started_s, done_bytes, num_tokens, num_bad = time.monotonic(), 0, 0, 0
    for position, result in execute(run_group, tasks):
        results[position] = result
        done_bytes += tasks[position].num_bytes
        num_tokens += result.num_tokens
        num_bad += sum(result.dropped.values())
        elapsed_s = max(1e-9, time.monotonic() - started_s)
        eta_s = elapsed_s * (total_bytes - done_bytes) / max(1, done_bytes)
        for example in result.dropped_examples:
            progress(f"dropped: {example}")
        for name in result.no_records:
            progress(f"passed over, JSON without records: {shown(name)}")
        progress(
            f"{len(results)}/{len(tasks)} groups, {num_tokens} tokens, {num_tokens / elapsed_s:.0f} tokens/s, "
            f"{num_bad} dropped, ETA {eta_s:.0f} s"
        )
    return [results[position] for position in range(len(tasks))]


def _max_bad(files: Sequence[InputFile], config: PrepareConfig) -> int | None:
    """Most bad records that can stay within max_bad_fraction f, if all other records that the files can hold are good.

    bad <= f * (bad + good) gives bad <= f / (1 - f) * good. None: only reading can tell.
    """
    good = most_good_records(files, config.text_field)
    if good is None or config.max_bad_fraction == 1:
        return None
    return int(config.max_bad_fraction / (1 - config.max_bad_fraction) * good)


def _check_bad(results: Sequence[GroupResult], config: PrepareConfig) -> None:
    """Raises DataError when more than max_bad_fraction of all records are bad."""
    num_bad = sum(sum(result.dropped.values()) for result in results)
    num_records = sum(result.num_records for result in results)
    if num_bad > config.max_bad_fraction * num_records:
        first = next(example for result in results for example in result.dropped_examples)
        raise DataError(
            f"prepare.max_bad_fraction: {config.max_bad_fraction}: {num_bad} of {num_records} records are bad, first: "
            f"{first}: mend the input or raise the limit; what is done is kept for the next run"
        )


def _report_unencoded(manifest: Manifest, progress: Progress) -> None:
    lost, unknown = manifest.report["characters_without_token"], manifest.report["unknown_tokens"]
    if lost:
        some = ", ".join(f"{c!r} {count} times" for c, count in list(lost.items())[:5])
        progress(
            f"warning: the tokenizer has no token for {len(lost)} characters of the kept documents: {some}: they are "
            "left out; give a byte-level tokenizer, or one with byte fallback or an unknown token"
        )
    if unknown:
        share = unknown / manifest.report["tokens_in"]
        progress(f"{unknown} tokens ({share:.2%}) are the tokenizer's unknown token")


def _tokenizer(
    store: Store,
    files: Sequence[InputFile],
    config: PrepareConfig,
    tokenizer: str,
    vocab_size: int,
    training_bytes: int,
    progress: Progress,
) -> Tokenizer:
    """The named tokenizer, or one that is trained here and stored, so that the same command uses it again."""
    if tokenizer:
        return _load(tokenizer)
    matters = settings_that_matter(config)
    identity = json.dumps([_listing(files), matters, vocab_size, training_bytes], sort_keys=True)
    key = f"tokenizers/{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        return tokenizer_from_bytes(store.get(key), key)
    except MissingObjectError:
        pass
    progress(f"training a tokenizer of {vocab_size} tokens")
    cuts: list[int] = []
    texts = _training_texts(files, config, training_bytes, progress)
    trained = train_tokenizer(texts, vocab_size, cuts.append)
    if cuts:
        progress(
            f"training the tokenizer: words of more than {LONGEST_WORD_CHARS} characters were cut in {len(cuts)} "
            f"texts, {sum(cuts)} characters left out; the dataset has all of them"
        )
    data = tokenizer_to_bytes(trained)
    # Of two runs at once both use the tokenizer that was stored first.
    return trained if store.put_if_absent(key, data) else tokenizer_from_bytes(store.get(key), key)


def _load(tokenizer: str) -> Tokenizer:
    url = absolute_place("tokenizer", tokenizer)
    place = parse_place(url)
    if isinstance(place, S3Place):
        if not place.prefix:
            raise DataError(f"tokenizer: {shown(tokenizer)}: is a bucket: give the URL of a tokenizer.json")
        return tokenizer_from_bytes(open_store(f"s3://{place.bucket}").get(place.prefix), shown(tokenizer))
    path = place if isinstance(place, str) else url
    folder, _, name = path.rpartition("/")
    return tokenizer_from_bytes(open_store(folder or "/").get(name), shown(path))


def _training_texts(
    files: Sequence[InputFile], config: PrepareConfig, training_bytes: int, progress: Progress
) -> Iterable[str]:
    """Texts from the beginnings of some files, which a hash of their names chooses."""
    drawn = sorted(files, key=lambda file: (key64(config.seed, "tokenizer", file.name), file.name))
    share = training_bytes // min(len(drawn), TRAINING_FILES)
    num_bytes = 0
    for file in drawn:
        if num_bytes >= training_bytes:
            return
        from_file, cut = 0, False
        # Bad records are not counted here, but when the dataset is made.
        for passage in read_documents([file], config.text_field, Dropped(), config.max_record_bytes):
            if from_file >= share:
                cut = passage.continues
                break
            yield passage.text
            from_file += len(passage.text.encode())
        if cut:
            progress(
                f"training the tokenizer: {passage.where}: cut after {from_file} bytes, the share of its file; the "
                f"dataset has all of it"
            )
        num_bytes += from_file


def _listing(files: Sequence[InputFile]) -> str:
    return json.dumps([[file.name, file.num_bytes] for file in files])


def _state(files: Sequence[InputFile]) -> str:
    """What a receipt depends on: a group is prepared again when one of its files was modified."""
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
