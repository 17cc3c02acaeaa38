"""No run-away over 4,096 tokens and 32 chunks and more at initialisation; benchmarks/stability.py does it trained."""

import pytest
import torch

from kernels import MemoryRule
from nltrain.model import LanguageModel, build
from tests.kernels.helpers import DEVICE
from tests.model.configs import small


def _model(rule: MemoryRule, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    return build(small("hope", rule=rule, width=32, head_dim=32, memory_hidden=32, num_layers=1, **changes)).to(DEVICE)


def _tokens(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 23, (1, num_tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize(("chunk", "num_tokens"), [(1, 4096), (16, 4096), (64, 4096), (256, 8192)])
def test_the_defaults_stay_finite_and_bounded(chunk: int, num_tokens: int) -> None:
    rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk)
    model, tokens = _model(rule), _tokens(num_tokens)
    with torch.no_grad():
        assert model(tokens)[0].isfinite().all()
    if chunk == 1:  # figures per token would take minutes
        return
    (figures,) = model.diagnostics(tokens)
    assert all(len(values) == num_tokens // chunk and values.isfinite().all() for values in figures.values())
    change = figures["change_over_weight"]
    assert change.max() < 0.5
    # Level, not growing: the last quarter is no further out than the second.
    quarter = len(change) // 4
    assert change[-quarter:].max() < 1.5 * change[quarter : 2 * quarter].max()
    assert (figures["v_over_k"] - 1).abs().max() < 1e-3
    assert figures["eta_max"].max() <= rule.eta_limit and figures["alpha_min"].min() > 0.9


@pytest.mark.parametrize(("chunk", "eta_max"), [(8, None), (16, None), (64, None), (16, 0.5)])
def test_a_run_of_16_equal_tokens_is_borne_at_the_default_cap_and_not_at_8_over_c(
    chunk: int, eta_max: float | None
) -> None:
    rule = MemoryRule(chunk_mem=chunk, chunk_other=chunk, eta_max=eta_max)
    model = _model(rule, eta_init=0.98 * rule.eta_limit)  # training pushes eta up to its cap
    with torch.no_grad():
        logits = model(_tokens(128).repeat_interleave(16, 1))[0]
    assert logits.isfinite().all() == (eta_max is None)


def test_the_papers_letter_breaks_without_a_bound_on_v() -> None:
    tokens, start = _tokens(4096), {"eta_init": 0.1, "alpha_init": 0.999}
    with torch.no_grad():
        assert not _model(MemoryRule.paper_letter(), **start)(tokens)[0].isfinite().all()
        bounded = MemoryRule.paper_letter(normalize_v=True)
        assert _model(bounded, **start)(tokens)[0].isfinite().all()


def test_the_diagnostics_show_the_break_before_it_comes() -> None:
    (figures,) = _model(MemoryRule.paper_letter(), eta_init=0.1, alpha_init=0.999).diagnostics(_tokens(4096))
    finite = figures["change_over_weight"].isfinite()
    assert not finite.all()
    last = int(finite.nonzero().max())
    assert figures["v_over_k"][: last + 1].max() > 10 or figures["change_over_weight"][: last + 1].max() > 10
