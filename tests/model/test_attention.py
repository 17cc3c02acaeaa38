"""Every way of attention gives the same numbers and sees the token's own document only; what cannot run is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nltrain.errors import ConfigError
from nltrain.model import arrange, build, say_choices
from nltrain.model.attention import AUTOMATIC, AttentionError, attend, chosen, refusal
from nltrain.model.packing import Packing
from tests.model.configs import small

CPU, META = torch.device("cpu"), torch.device("meta")


def _starts() -> Tensor:
    starts = torch.zeros(3, 20, dtype=torch.bool)
    starts[0, [0, 1, 9]] = True
    starts[2, 19] = True
    return starts


def _qkv(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 20, 2, 8, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def _with(way: str, packing: Packing, qkv: list[Tensor]) -> list[Tensor]:
    out = attend(*qkv, replace(packing, attention=way))
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


def test_documents_give_what_a_dense_mask_gives() -> None:
    qkv, packing = _qkv(), Packing.of((3, 20), _starts())
    assert packing.lengths == (1, 8, 11, 20, 19, 1)
    for a, b in zip(_with("documents", packing, qkv), _with("mask", packing, qkv), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ends_are_padded_with_empty_documents_to_few_lengths() -> None:
    packing = Packing.of((3, 20), _starts())
    assert packing.ends is not None and packing.ends.dtype == torch.int32
    assert packing.ends.tolist() == [0, 1, 9, 20, 40, 59, 60, 60, 60]  # 6 documents, as 8
    one_more = _starts()
    one_more[1, 3] = True
    assert len(Packing.of((3, 20), one_more).ends) == len(packing.ends)  # type: ignore[arg-type]


def test_one_launch_for_all_documents_reads_nothing_on_the_host() -> None:
    qkv, packing = _qkv("meta", torch.bfloat16), Packing.of((3, 20), _starts()).to("meta")
    for x in _with("varlen", packing, qkv):
        assert x.shape == (3, 20, 2, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_launch_for_all_documents_gives_what_a_dense_mask_gives() -> None:
    qkv, packing = _qkv("cuda", torch.bfloat16), Packing.of((3, 20), _starts()).to("cuda")
    for a, b in zip(_with("varlen", packing, qkv), _with("mask", packing, qkv), strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_auto_takes_the_first_way_that_can_run() -> None:
    assert chosen("auto", 128, False, META, torch.bfloat16) == "varlen"
    assert chosen("auto", 128, False, META, torch.float32) == "documents"
    assert chosen("auto", 128, False, CPU, torch.bfloat16) == "documents"
    assert chosen("auto", 128, True, CPU, torch.float32) == "mask"
    assert chosen("auto", 20, False, META, torch.bfloat16) == "documents"


@pytest.mark.parametrize(
    ("way", "head_dim", "compiled", "device", "dtype", "reason"),
    [
        ("flash", 64, False, None, torch.float32, "choose one of auto, varlen, documents, mask"),
        ("documents", 64, True, None, torch.float32, "every batch has other documents"),
        ("varlen", 20, False, None, torch.bfloat16, "heads of 20 do not fit"),
        ("varlen", 64, False, CPU, torch.bfloat16, "it needs a GPU, the model is on cpu"),
        ("varlen", 64, False, META, torch.float32, "it computes in bf16 or fp16"),
    ],
)
def test_a_way_that_cannot_run_says_why(way, head_dim, compiled, device, dtype, reason) -> None:
    assert (refusal(way, head_dim, compiled, device, dtype) or "").startswith(reason)


def test_a_forced_way_that_cannot_run_is_an_error_of_the_model_and_of_the_job() -> None:
    config = small("transformer", attention="varlen")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(AttentionError, match="attention = 'varlen': it needs a GPU"):
        build(config)(tokens)
    with pytest.raises(ConfigError, match=r"model\.attention = 'varlen': it needs a GPU"):
        say_choices(config, CPU, torch.float32)


@pytest.mark.parametrize("way", AUTOMATIC[1:])
@pytest.mark.parametrize("family", ["transformer", "hope_attention"])
def test_packed_documents_train_alike_by_every_way(family: str, way: str) -> None:
    torch.manual_seed(0)
    model = build(small(family, attention=way, down_init="small")).double()
    other = build(small(family, attention="mask")).double()
    other.load_state_dict(model.state_dict())
    tokens, starts = torch.randint(0, 23, (3, 20)), _starts()
    for which, documents in ((model, arrange(model.config, starts)), (other, starts)):
        which.loss(tokens, tokens, documents).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "memories by chunk (auto), the backward pass computes nothing again, the loss takes at most"),
        ({"kernel": "naive"}, "memories by naive (naive)"),
        (
            {"family": "transformer", "recompute": "block"},
            "attention inside documents by documents (auto)",
        ),
        ({"compile": "steps", "compile_backend": "aot_eager"}, "memories by chunk (auto), steps compiled by aot_eager"),
    ],
)
def test_the_log_says_what_computes_the_model(changes: dict, said: str) -> None:
    config = small(changes.pop("family", "hope"), **changes)
    assert say_choices(config, CPU, torch.float32).startswith(said)


@pytest.mark.parametrize(
    ("family", "compiled", "message"),
    [
        ("transformer", "blocks", r"model\.compile_backend = 'nonesuch': torch has no back end"),
        ("hope", "steps", r"model\.kernel = 'auto': .*torch has no back end 'nonesuch'"),
    ],
)
def test_a_back_end_that_cannot_run_is_refused_before_the_model_is_built(family, compiled, message) -> None:
    config = small(family, compile=compiled, compile_backend="nonesuch")
    with pytest.raises(ConfigError, match=message):
        say_choices(config, CPU, torch.float32)
