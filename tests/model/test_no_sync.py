"""No step waits for its device: on the meta device, which holds no values, whatever reads one raises."""

from dataclasses import replace

import pytest
import torch

from kernels import MemoryRule
from nltrain.model import ModelConfig, arrange, build, preset
from tests.model.configs import ALL_CONFIGS, small

CONFIGS = ALL_CONFIGS | {
    "hope_default_rule": small("hope", rule=MemoryRule()),
    "hope_recompute_chunks": small("hope", recompute="chunks"),
    "hope_recompute_block": small("hope", recompute="block"),
    "transformer_recompute_block": small("transformer", recompute="block"),
    "hope_loss_in_pieces": small("hope", logits_bytes=1),
    "hope_truncated": small("hope", truncate_chunks=1),
}


def _starts(num_tokens: int) -> torch.Tensor:
    starts = torch.zeros(3, num_tokens, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, [3, 12]] = True
    return starts


def _step(config: ModelConfig, starts: torch.Tensor, dtype: torch.dtype) -> None:
    """Forward, loss and backward on the meta device, with the arrangement of `starts` made on the host."""
    with torch.device("meta"):
        model = build(config).to(dtype)
    tokens = torch.zeros(starts.shape, dtype=torch.long, device="meta")
    model.loss(tokens, tokens, arrange(config, starts).to("meta")).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("documents", [False, True])
def test_a_micro_step_of_the_whole_model_reads_nothing_from_its_device(name: str, documents: bool) -> None:
    starts = _starts(20)
    _step(CONFIGS[name], starts if documents else torch.zeros_like(starts), torch.bfloat16)


@pytest.mark.parametrize("family", ["hope", "transformer"])
def test_nor_does_one_of_the_jobs_models(family: str) -> None:
    config = replace(preset(family, "1p3b"), num_layers=1, recompute="block")
    _step(config, _starts(200), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["hope", "titans", "matrix", "transformer", "hope_attention"])
def test_nor_does_one_on_a_gpu(family: str) -> None:
    config, starts = small(family, recompute="block", head_dim=16, width=32, logits_bytes=1), _starts(20)
    model = build(config, "cuda", torch.bfloat16)
    tokens = torch.zeros(starts.shape, dtype=torch.long).pin_memory()
    documents = arrange(config, starts).pin_memory()
    model.loss(tokens.cuda(), tokens.cuda(), documents.to("cuda")).backward()  # what is made on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = tokens.to("cuda", non_blocking=True)
        model.loss(on_device, on_device, documents.to("cuda", non_blocking=True)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_documents_that_only_the_device_knows_would_be_read_from_it() -> None:
    with torch.device("meta"):
        model = build(small("hope"))
        tokens, starts = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="meta"):
        model.loss(tokens, tokens, starts)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layout_made_beside_the_data_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    config, starts = CONFIGS[name], _starts(20)
    model, tokens = build(replace(config, down_init="small")), torch.randint(0, 23, starts.shape)
    want = model.loss(tokens, tokens, starts)
    want.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    got = model.loss(tokens, tokens, arrange(config, starts).to("cpu"))
    got.backward()
    assert torch.equal(got, want)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
