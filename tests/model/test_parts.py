"""The modules that own parameters, and the feed-forward parts made of them, against plain formulas."""

import pytest
import torch
from torch.nn import functional as F

from nltrain.model.feedforward import CMS, SwiGLU
from nltrain.model.parts import CausalConv, HeadNorm, MemoryHolder, TiedEmbedding
from tests.model.configs import ALL_CONFIGS, small


def test_the_convolution_sees_its_own_and_earlier_inputs_only() -> None:
    torch.manual_seed(0)
    conv = CausalConv(width=3, taps=4, paths=2)
    u, history = torch.randn(2, 5, 3), torch.randn(2, 3, 3)
    padded = torch.cat([history, u], 1)
    want = torch.stack([
        F.silu(sum(padded[:, 3 - j : 8 - j] * conv.weight[j, path] for j in range(4))) for path in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(conv(u, history, None), want)
    seen = torch.ones(2, 5, 3)
    torch.testing.assert_close(conv(u, history, seen), want)
    seen[0, 2:] = 0
    alone = conv(u, history, seen)[:, 0, 2]
    torch.testing.assert_close(alone, F.silu(u[0, 2] * conv.weight[0]))


def test_each_head_is_normed_alone() -> None:
    norm, x = HeadNorm(2, 4, 1e-6), torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[..., 0, :] *= 100
    a, b = norm(x), norm(changed)
    assert a.shape == (1, 3, 8) and torch.equal(a[..., 4:], b[..., 4:])
    torch.testing.assert_close(a[..., :4], b[..., :4], rtol=1e-4, atol=1e-4)


def test_the_embedding_is_both_ends_and_ignored_targets_cost_nothing() -> None:
    embedding = TiedEmbedding(7, 4, logits_bytes=1 << 20)
    tokens = torch.tensor([[1, 2, 3]])
    x = embedding(tokens)
    logits = embedding(x)
    assert torch.equal(logits, x @ embedding.weight.T)
    loss = embedding(x, torch.tensor([[2, -100, 4]]))
    torch.testing.assert_close(loss, -logits[0].log_softmax(-1)[[0, 2], [2, 4]].sum())


@pytest.mark.parametrize("name", [n for n, c in ALL_CONFIGS.items() if c.family in ("hope", "titans", "matrix")])
def test_the_holder_gives_the_kernels_copies_in_the_shapes_of_the_rule(name: str) -> None:
    config = ALL_CONFIGS[name]
    rule, heads, d, h = config.rule, config.num_heads, config.head_dim, config.memory_hidden
    holder = MemoryHolder(rule, heads, d, h, 0.02, 1.0, None, 0.99).bfloat16()
    initial = MemoryHolder.pack(holder())
    assert initial.weights.w2.shape == (heads, rule.num_rows(d, h), d) and initial.weights.w2.dtype == torch.float32
    assert initial.slow.shape == (2, heads, d) and initial.bias.shape == (2, heads)
    assert (initial.weights.w1 is None) == (rule.memory == "matrix")
    held = {p.untyped_storage().data_ptr() for p in holder.parameters()}
    assert not held & {t.untyped_storage().data_ptr() for t in holder()}


@pytest.mark.parametrize("variant", ["chain", "independent"])
def test_the_levels_are_chained_or_summed(variant: str) -> None:
    torch.manual_seed(0)
    cms, x = CMS(small("hope", cms_variant=variant)), torch.randn(1, 3, 16)
    want = x
    for name in ("fast", "mid", "slow"):
        want = want + cms[name](want if variant == "chain" else x)
    torch.testing.assert_close(cms(x), want)


def test_swiglu_adds_its_residual() -> None:
    torch.manual_seed(0)
    ffn, x = SwiGLU(small("transformer")), torch.randn(1, 3, 16)
    n = ffn.norm(x)
    torch.testing.assert_close(ffn(x), x + ffn.down(F.silu(ffn.gate(n)) * ffn.up(n)))
