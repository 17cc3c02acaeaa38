"""A small dataset, a small model and a group of one rank, shared by the tests of this room."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from nltrain.data import train_tokenizer
from nltrain.data.config import DataConfig
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.evaluate.protocol import Setting
from nltrain.model import build, preset
from nltrain.store import open_store

SEQ_LEN, VOCAB_SIZE = 64, 300


@pytest.fixture(scope="package", autouse=True)
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="package")
def setting(tmp_path_factory):
    """10 held-out sequences, evaluated every 300 tokens of quanta of 200, to T = 1000."""
    folder = tmp_path_factory.mktemp("evaluate")
    documents = [(name, text[:3000]) for name, text in list(stdlib_corpus())[:12]]
    tokenizer = train_tokenizer([text for _, text in documents], VOCAB_SIZE)
    store = open_store(str(folder / "corpus"))
    prepare(documents, store, tokenizer, PrepareConfig(SEQ_LEN, validation_fraction=0.4))
    data = DataConfig(prefix=str(folder / "corpus"), seq_len=SEQ_LEN, cache_dir=str(folder / "cache"))
    return Setting(
        data=data, num_sequences=10, micro_batch_size=4, every_tokens=300, quantum_tokens=200, total_tokens=1000,
        reference_max_tokens=10**9, rank=0, world_size=1, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture(scope="package")
def model():
    torch.manual_seed(0)
    config = preset("transformer", "tiny")
    return build(dataclasses.replace(config, vocab_size=VOCAB_SIZE, width=16, num_layers=1, head_dim=8))
