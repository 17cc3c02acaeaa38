"""Train Hope through its levels, save, export, load alone: the same logits to the last bit."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from benchmarks._level_toys import SEQ_LEN, levels, train
from nltrain.checkpoint import Checkpointer
from nltrain.checkpoint.errors import MismatchError
from nltrain.checkpoint.exported import load_model
from nltrain.checkpoint.tools import export_main
from nltrain.levels.scheduler import LevelScheduler
from nltrain.model import LanguageModel, ModelConfig, build, preset
from nltrain.store import open_store
from tests.checkpoint.support import run_ranks, settings

SEQUENCES = 4  # of a quantum
DTYPES = ("fp32", "bf16")  # of what the forward computes with


def hope() -> tuple[ModelConfig, LanguageModel]:
    config = preset("hope", "tiny")
    config = dataclasses.replace(config, rule=dataclasses.replace(config.rule, chunk_mem=4, chunk_other=4))
    return config, build(config)


def trained_and_exported(rank: int, size: int, url: str) -> None:
    logging.disable(logging.CRITICAL)
    tokens = torch.arange(3 * 24).view(3, 24) * 37 % 4000
    for dtype in DTYPES:
        torch.manual_seed(0)
        config, model = hope()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        quantum = SEQUENCES * SEQ_LEN
        scheduler = LevelScheduler(model, levels(quantum, (1, 2, 2, 4), dtype=dtype), SEQ_LEN)
        initial = model(tokens)[0].clone()
        train(model, scheduler, rank, size, range(4), micro_batch=2)
        logits = model(tokens)[0]
        assert not torch.equal(logits, initial)
        checkpoints = Checkpointer(open_store(url), dtype, None, settings(url))
        weights = {name: (f"{name}.master", shape) for name, shape in shapes.items()}
        own = {"levels": scheduler.rank_state()}
        state = {"config": {"model": config.to_dict()}, "levels": scheduler.state_dict()}
        assert checkpoints.save(scheduler.tokens, scheduler.fragments(), state, own, weights)
        checkpoints.wait()
        scheduler.close()
        folder = f"{url}/{dtype}-out"
        assert export_main([f"{url}/{dtype}", folder, "--shard-size", "400KB", "--dtype", dtype]) == 0
        torch.manual_seed(1)
        fresh = load_model(folder)
        assert torch.equal(fresh(tokens)[0], logits)


def test_an_exported_hope_gives_the_same_logits_in_a_fresh_model(tmp_path: Path) -> None:
    run_ranks(1, trained_and_exported, str(tmp_path))
    folder = tmp_path / "fp32-out"
    about = json.loads((folder / "config.json").read_text())
    about["model"]["vocab_size"] //= 2
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(MismatchError, match="has shape"):
        load_model(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"config\.json: no model"):
        load_model(folder)
