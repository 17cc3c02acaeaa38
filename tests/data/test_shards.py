"""Packing loses no token and no boundary, costs few bytes, and stays readable by webdataset."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from nltrain.data.shards import MemberView, ShardIndex, ShardPacker, member_range
from nltrain.data.tokenizer import token_dtype
from tests.data.support import make_dataset


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=40),
    st.integers(1, 17),
    st.integers(1, 200),
    st.integers(1, 3000),
    st.sampled_from([300, 70_000]),
)
def test_tokens_and_boundaries_survive_packing(
    lengths: list[int], seq_len: int, bytes_per_member: int, bytes_per_shard: int, vocab_size: int
) -> None:
    documents = np.split(np.arange(sum(lengths)) % vocab_size, np.cumsum(lengths)[:-1])
    packer = ShardPacker("s", seq_len, token_dtype(vocab_size), bytes_per_member, bytes_per_shard)
    finished = [shard for document in documents for shard in packer.add(document)] + packer.finish()
    tokens, starts, num_targets = [], [], 0
    for shard, data, index_data in finished:
        index = ShardIndex.parse(index_data, "u", shard.index_sha256)
        assert len(data) == shard.num_bytes
        for position, member in enumerate(index.members):
            view = MemberView.cut(index, position, memoryview(data))
            start, length = member_range(member)
            alone = MemberView.cut(index, position, memoryview(data)[start : start + length], base=start)
            assert view.is_intact() and alone.is_intact()
            for slot in range(member.num_sequences):
                sequence = view.sequence(slot)
                assert (sequence.tokens[sequence.num_targets + 1 :] == 0).all()
                starts += [len(tokens) + int(start) for start in sequence.starts]
                # A sequence without targets holds nothing but a document's only token, which the last one ended with.
                tokens += sequence.tokens[: max(sequence.num_targets, 0)].tolist()
                num_targets += sequence.num_targets
                last = int(sequence.tokens[sequence.num_targets])
    tokens.append(last)
    assert tokens == np.concatenate(documents).tolist()
    assert starts == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert sum(shard.num_tokens for shard, _, _ in finished) == sum(lengths)
    assert sum(shard.num_targets for shard, _, _ in finished) == num_targets == sum(lengths) - 1
    assert sum(shard.num_documents for shard, _, _ in finished) == len(lengths)


@pytest.mark.parametrize("seq_len", [256, 1024, 4096])
def test_tar_costs_less_than_five_percent(tmp_path: Path, seq_len: int) -> None:
    defaults = {"bytes_per_member": 256 << 10, "bytes_per_shard": 16 << 20}
    dataset = make_dataset(str(tmp_path), (1 << 20) // seq_len, seq_len, **defaults)
    payload = sum(
        member.tokens.num_bytes + member.starts.num_bytes
        for shard in range(len(dataset.shards))
        for member in dataset.index(shard).members
    )
    total = sum(shard.num_bytes for shard in dataset.shards)
    assert 1 - payload / total <= 0.05


def test_webdataset_and_tar_read_a_shard(tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path), 50)
    path = tmp_path / dataset.shards[0].key
    members = dataset.index(0).members
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [member.key for member in members]
    assert [len(sample["tokens"]) for sample in samples] == [member.tokens.num_bytes for member in members]
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
    assert {entry.mtime for entry in entries} == {0}
    assert [entry.offset_data for entry in entries] == [
        entry.offset for member in members for entry in (member.starts, member.tokens)
    ]
