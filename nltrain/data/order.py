"""The order of samples: a pure function of (seed, datasets, weights) that does not depend on ranks or restarts.

Sample i of a run is a sequence of one of the datasets. The datasets take turns in proportion to their weights; each has
its own cursor and epochs. The position is the number of samples consumed, so restoring is a seek. Guarantee: n whole
epochs of a dataset hold each of its sequences exactly n times.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nltrain.data.config import DataConfig
from nltrain.data.dataset import TokenDataset
from nltrain.data.errors import DataError
from nltrain.data.hashing import key64, mix64
from nltrain.data.permutation import EpochOrder
from nltrain.store import open_store

# Datasets are mixed in blocks of this many samples with exact quotas, so weights are rounded to 1 / BLOCK_SAMPLES.
BLOCK_SAMPLES = 4096
BLOCKS_HELD = 4


class SampleAddress(NamedTuple):
    """Where the sequence of one sample lies."""

    dataset: int
    epoch: int  # of that dataset
    shard: int
    offset: int  # sequence within the shard


class SampleAddresses(NamedTuple):
    """The addresses of n samples, each field [n] int64."""

    dataset: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    offset: np.ndarray


class SampleOrder:
    """Sample index -> SampleAddress. Sample indices count from the beginning of the run, over all ranks and epochs."""

    def __init__(
        self,
        seed: int,
        datasets: Sequence[TokenDataset],
        weights: Sequence[float] = (),
        window_shards: int = 16,
    ):
        """Raises DataError when the datasets do not fit together."""
        if not datasets:
            raise DataError("data.prefix: empty: give the URL of a prepared dataset")
        _check_compatible(datasets)
        self.seed, self.datasets, self.window_shards = seed, tuple(datasets), window_shards
        self.seq_len, self.vocab_size = datasets[0].seq_len, datasets[0].vocab_size
        self.weights = _normalised(weights or [dataset.num_sequences for dataset in datasets])
        self._quotas = _quotas(self.weights, [dataset.url for dataset in datasets])
        self._orders = [
            EpochOrder(key64(seed, "dataset", number), dataset.sequences_per_shard, window_shards)
            for number, dataset in enumerate(datasets)
        ]
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __call__(self, sample_index: int) -> SampleAddress:
        return SampleAddress(*(int(column[0]) for column in self.addresses([sample_index])))

    def addresses(self, sample_indices: Sequence[int] | np.ndarray) -> SampleAddresses:
        """The addresses of many samples at once."""
        indices = np.asarray(sample_indices, np.int64)
        numbers, cursors = self._cursors(indices)
        epochs, shards, offsets = np.empty_like(indices), np.empty_like(indices), np.empty_like(indices)
        for number, order in enumerate(self._orders):
            chosen = np.nonzero(numbers == number)[0]
            if len(chosen):
                epochs[chosen], shards[chosen], offsets[chosen] = order.locate(cursors[chosen])
        return SampleAddresses(numbers, epochs, shards, offsets)

    def cursors(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples of the run each dataset gives."""
        block, rest = divmod(num_samples, BLOCK_SAMPLES)
        if len(self.datasets) == 1:
            return [num_samples]
        labels, _ = self._block(block)
        return [
            int(block * quota + np.count_nonzero(labels[:rest] == number)) for number, quota in enumerate(self._quotas)
        ]

    def windows_from(self, sample_index: int, num_windows: int = 2) -> list[tuple[int, int]]:
        """(dataset, shard) of the shards of the current window of each dataset, then of the windows after it."""
        per_dataset = [
            order.shards_from(cursor, num_windows)
            for order, cursor in zip(self._orders, self.cursors(sample_index), strict=True)
        ]
        wanted = [
            (number, shard)
            for window in range(num_windows)
            for number, windows in enumerate(per_dataset)
            for shard in windows[window]
        ]
        return list(dict.fromkeys(wanted))

    def state(self, num_samples: int) -> dict[str, Any]:
        """The position after `num_samples` samples consumed by finished steps, with what must not change; JSON-able."""
        return {
            "seed": self.seed,
            "samples": num_samples,
            "window_shards": self.window_shards,
            "datasets": [
                {
                    "url": dataset.url,
                    "split": dataset.split,
                    "fingerprint": dataset.fingerprint,
                    "weight": weight,
                    "epoch": cursor // dataset.num_sequences,
                    "cursor": cursor,
                }
                for dataset, weight, cursor in zip(self.datasets, self.weights, self.cursors(num_samples), strict=True)
            ],
        }

    def restore(self, state: dict[str, Any], allow_other_data: bool = False) -> int:
        """The number of samples consumed at `state`.

        Raises DataError for the state of another order, unless allow_other_data. Datasets may have moved to another
        URL, but must hold the same sequences.
        """
        if not allow_other_data:
            here = self.state(state["samples"])
            for name in ("seed", "window_shards"):
                if here[name] != state[name]:
                    raise DataError(
                        f"data.{name}: {here[name]}, but the state was saved with {state[name]}: the order of samples "
                        f"would change; set it back, or set checkpoint.other_data=true"
                    )
            if len(here["datasets"]) != len(state["datasets"]):
                raise DataError(
                    f"data.prefix: {len(here['datasets'])} datasets, but the state was saved with "
                    f"{len(state['datasets'])}: name the same ones, or set checkpoint.other_data=true"
                )
            for now, then in zip(here["datasets"], state["datasets"], strict=True):
                for name in ("fingerprint", "split", "weight"):
                    if now[name] != then[name]:
                        raise DataError(
                            f"{now['url']}: {name} {now[name]}, but the state was saved with {then[name]} "
                            f"({then['url']}): point data.prefix at that dataset, or set checkpoint.other_data=true"
                        )
        return int(state["samples"])

    def _cursors(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, cursor in it) of each sample."""
        if len(self.datasets) == 1:
            return np.zeros_like(indices), indices
        numbers, cursors = np.empty_like(indices), np.empty_like(indices)
        blocks, slots = np.divmod(indices, BLOCK_SAMPLES)
        for block in np.unique(blocks):
            chosen = blocks == block
            labels, earlier = self._block(int(block))
            numbers[chosen] = labels[slots[chosen]]
            cursors[chosen] = block * self._quotas[numbers[chosen]] + earlier[slots[chosen]]
        return numbers, cursors

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a block: its dataset, and how many earlier slots of the block have the same one."""
        found = self._blocks.get(block)
        if found is None:
            shuffled = np.argsort(mix64(np.arange(BLOCK_SAMPLES), key64(self.seed, "mix", block)), kind="stable")
            labels = np.repeat(np.arange(len(self._quotas)), self._quotas)[shuffled]
            earlier = np.empty(BLOCK_SAMPLES, np.int64)
            for number, quota in enumerate(self._quotas):
                earlier[labels == number] = np.arange(quota)
            found = (labels, earlier)
            self._blocks[block] = found
            if len(self._blocks) > BLOCKS_HELD:
                self._blocks.popitem(last=False)
        return found


def open_order(config: DataConfig) -> SampleOrder:
    """Opens the datasets that `config` names; returns the order of their samples.

    Raises DataError or StoreError in one line: no dataset there, another seq_len, mixed tokenizers, no credentials, ...
    """
    datasets = []
    for prefix in config.prefixes:
        store = open_store(prefix, attempts=config.attempts, timeout_s=config.timeout_s)
        dataset = TokenDataset.open(store, config.split)
        if dataset.seq_len != config.seq_len:
            raise DataError(
                f"data.seq_len: {config.seq_len}, but {dataset.url} was prepared with {dataset.seq_len}: "
                "set it to that, or prepare again with the wanted length"
            )
        datasets.append(dataset)
    return SampleOrder(config.seed, datasets, config.weights, config.window_shards)


def _check_compatible(datasets: Sequence[TokenDataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise DataError(
                f"data.prefix: {first.url} (vocabulary {first.vocab_size}) and {other.url} (vocabulary "
                f"{other.vocab_size}) were made by different tokenizers: prepare both with one tokenizer.json"
            )
        if other.seq_len != first.seq_len:
            raise DataError(
                f"data.prefix: {first.url} has seq_len {first.seq_len}, {other.url} has {other.seq_len}: "
                "prepare both with one length"
            )


def _normalised(weights: Sequence[float]) -> list[float]:
    total = float(sum(weights))
    return [float(weight) / total for weight in weights]


def _quotas(weights: list[float], urls: list[str]) -> np.ndarray:
    """Samples of each dataset in a block; largest remainders round up, so that the quotas sum to the block."""
    exact = np.array(weights) * BLOCK_SAMPLES
    quotas = np.floor(exact).astype(np.int64)
    remainders = np.argsort(-(exact - quotas), kind="stable")
    quotas[remainders[: BLOCK_SAMPLES - int(quotas.sum())]] += 1
    if (quotas == 0).any():
        number = int(np.argmin(quotas))
        raise DataError(
            f"data.weights: {weights[number]:.2g} for {urls[number]} is below the smallest share, 1/{BLOCK_SAMPLES}: "
            "raise it or leave the dataset out"
        )
    return quotas
