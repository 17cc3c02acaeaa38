"""The order of samples: each exactly once per epoch, whatever the ranks, restarts and cuts."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nltrain.data import DataConfig, DataError, SampleOrder, TokenDataset, open_order, train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare
from nltrain.levels.quantum import cut_quantum
from nltrain.store import open_store
from tests.data.support import make_dataset

WORLD_SIZES = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> SampleOrder:
    return SampleOrder(7, [make_dataset(str(tmp_path_factory.mktemp("order") / "set"), 203)], window_shards=2)


def consumed(first_quantum: int, num_quanta: int, quantum: int, micro: int, world_size: int) -> list[list[int]]:
    """Per quantum, the sample indices that the ranks together consume, by micro-step and rank."""
    found = []
    for number in range(first_quantum, first_quantum + num_quanta):
        steps = cut_quantum(quantum, micro, world_size)
        found.append([number * quantum + i for step in steps for part in step for i in part])
    return found


@given(st.data())
@settings(max_examples=60)
def test_exactly_once_over_ranks_and_restarts(order: SampleOrder, data: st.DataObject) -> None:
    """Kills at any quantum, another world size and micro-batch after each: every sequence exactly once per epoch."""
    quantum = data.draw(st.integers(1, 40), "quantum")
    total_quanta = -(-2 * 203 // quantum)
    position, samples = 0, []
    while position < total_quanta:
        world_size = data.draw(st.sampled_from(WORLD_SIZES), "world size")
        micro = data.draw(st.integers(1, 8), "micro-batch")
        finished = data.draw(st.integers(1, total_quanta - position), "quanta until the kill")
        samples += itertools.chain(*consumed(position, finished, quantum, micro, world_size))
        # Restored from the state of the last finished quantum.
        position += finished
        assert order.restore(order.state(position * quantum)) == position * quantum
    assert samples == list(range(total_quanta * quantum))
    addresses = order.addresses(samples[: 2 * 203])
    places = list(zip(addresses.epoch.tolist(), addresses.shard.tolist(), addresses.offset.tolist(), strict=True))
    assert len(set(places)) == 2 * 203


@given(st.integers(1, 64), st.integers(1, 9))
def test_a_quantum_has_the_same_samples_in_the_same_order_at_every_world_size(quantum: int, micro: int) -> None:
    alone = consumed(0, 3, quantum, 1, 1)
    for world_size in WORLD_SIZES:
        assert consumed(0, 3, quantum, micro, world_size) == alone


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("mixed")
    return [make_dataset(str(folder / str(size)), size, seed=size) for size in (30, 64, 111, 9)]


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.integers(0, 1000))
@settings(max_examples=20)
def test_mixed_datasets_keep_their_shares_cursors_and_epochs(
    mixed: list[TokenDataset], weights: list[float], seed: int
) -> None:
    order = SampleOrder(seed, mixed[: len(weights)], weights)
    num_samples = 10_000
    addresses = order.addresses(range(num_samples))
    total = sum(weights)
    for number, (dataset, weight) in enumerate(zip(order.datasets, weights, strict=True)):
        mine = np.nonzero(addresses.dataset == number)[0]
        assert abs(len(mine) / num_samples - weight / total) < 0.02
        assert order.cursors(num_samples)[number] == len(mine)
        cut = 4321
        assert order.cursors(cut)[number] == int((mine < cut).sum())
        # Its own epochs, in order, each complete.
        assert (np.diff(addresses.epoch[mine]) >= 0).all()
        first_epoch = mine[addresses.epoch[mine] == 0]
        places = set(zip(addresses.shard[first_epoch].tolist(), addresses.offset[first_epoch].tolist(), strict=True))
        assert len(places) == len(first_epoch) <= dataset.num_sequences
        if len(mine) > dataset.num_sequences:
            assert len(places) == dataset.num_sequences


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_seed": 1}, "fingerprint .* but the state was saved with .*point data.prefix at that dataset"),
        ({"seed": 8}, "data.seed: 8, but the state was saved with 7"),
        ({"window_shards": 3}, "data.window_shards: 3, but the state was saved with 2"),
        ({"num_datasets": 2}, "data.prefix: 2 datasets, but the state was saved with 1"),
    ],
    ids=["other sequences", "seed", "window", "one dataset more"],
)
def test_a_state_of_another_order_is_refused_unless_allowed(
    tmp_path: Path, order: SampleOrder, options: dict[str, int], says: str
) -> None:
    datasets = [
        make_dataset(str(tmp_path / str(n)), 203, seed=options.get("data_seed", 0))
        for n in range(options.get("num_datasets", 1))
    ]
    other = SampleOrder(options.get("seed", 7), datasets, window_shards=options.get("window_shards", 2))
    state = order.state(123)
    with pytest.raises(DataError, match=says):
        other.restore(state)
    assert other.restore(state, allow_other_data=True) == 123


def test_datasets_may_have_moved(tmp_path: Path, order: SampleOrder) -> None:
    moved = make_dataset(str(tmp_path / "moved"), 203)
    assert SampleOrder(7, [moved], window_shards=2).restore(order.state(123)) == 123 == order.restore(order.state(123))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets: a, one of longer sequences, and one of another tokenizer."""
    folder = tmp_path_factory.mktemp("places")
    make_dataset(str(folder / "a"), 100)
    make_dataset(str(folder / "longer"), 100, 32)
    words = "entirely different text, in more words"
    config = PrepareConfig(seq_len=16, validation_fraction=0.0)
    prepare([("one", words * 20)], open_store(str(folder / "other")), train_tokenizer([words] * 3, 290), config)
    return folder


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        ("", {}, "data.prefix: empty: give the URL of a prepared dataset"),
        ("none", {}, "{0}/none/manifest.json: no prepared dataset there"),
        ("a", {"seq_len": 32}, "data.seq_len: 32, but {0}/a was prepared with 16: set it to that"),
        ("a", {"split": "test"}, "data.split: 'test' is not in {0}/a"),
        ("a", {"split": "validation"}, "{0}/a: split 'validation' holds no sequences"),
        ("a,longer", {}, "data.seq_len: 16, but {0}/longer was prepared with 32"),
        ("a,other", {}, "data.prefix: {0}/a (vocabulary 277) and {0}/other (vocabulary 285) were made by different "),
        ("a,a", {"weights": (1.0, 1e-6)}, "data.weights: 1e-06 for {0}/a is below the smallest share, 1/4096"),
    ],
    ids=["no prefix", "no dataset", "length", "split", "empty split", "two lengths", "two tokenizers", "tiny share"],
)
def test_datasets_that_do_not_fit_are_refused_in_one_line(
    places: Path, names: str, options: dict[str, Any], says: str
) -> None:
    prefix = ",".join(f"{places}/{name}" for name in names.split(",") if name)
    with pytest.raises(DataError) as error:
        open_order(DataConfig(prefix=prefix, **{"seq_len": 16, **options}))
    assert str(error.value).startswith(says.format(places)) and "\n" not in str(error.value)


def test_two_lengths_are_refused_by_the_order_too(places: Path) -> None:
    datasets = [TokenDataset.open(str(places / name)) for name in ("a", "longer")]
    with pytest.raises(DataError, match=r"a has seq_len 16, .*longer has 32: prepare both with one length"):
        SampleOrder(0, datasets)
