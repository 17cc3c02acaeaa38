"""No text breaks the default rule; the letter and the one-sided erasure break. benchmarks/stability.py has more."""

import pytest
import torch

from benchmarks._memory_cases import DEVICE
from benchmarks._texts import TEXTS, text
from benchmarks.stability import ALPHAS, ATTACK_SIZES, BOUND, NUM_SEEDS, at_chunk, attack, config_of, judge, push_gates
from kernels import MemoryRule
from nltrain.model import LanguageModel, build
from nltrain.model.packing import Packing
from tests.model.configs import small

REPETITIONS = ("constant", "period 2", "runs of 200")


def _model(rule: MemoryRule, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    return build(small("hope", rule=rule, width=32, head_dim=32, memory_hidden=32, num_layers=1, **changes)).to(DEVICE)


def _tokens(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 23, (1, num_tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def _grid(rule: MemoryRule, names: tuple[str, ...], num_tokens: int, head_dim: int = 32) -> tuple[int, float]:
    """Failed cases, and the largest |dW| / |W|: three alphas and three seeds, eta at 0.98 of its cap."""
    torch.manual_seed(head_dim)
    alphas = [alpha for alpha in ALPHAS for _ in range(NUM_SEEDS)]
    model = build(config_of(rule, head_dim, len(alphas)))
    push_gates(model, alphas)
    finite, ratio = judge(model, torch.stack([text(name, num_tokens, 7) for name in names]))
    return int((~finite | ~(ratio <= BOUND)).sum()), ratio.max().item()


@pytest.mark.parametrize("chunk", [16, 64])
def test_no_text_breaks_the_default_rule(chunk: int) -> None:
    """Outputs, states and gradients of 4,096 tokens."""
    failed, ratio = _grid(at_chunk(MemoryRule(), chunk), ("constant", "runs of 200", "indented code"), 4096)
    assert failed == 0 and ratio < BOUND


def test_every_text_passes_at_heads_of_128() -> None:
    failed, _ = _grid(MemoryRule(), tuple(TEXTS)[:4], 1024, head_dim=128)
    assert failed == 0


def test_erasure_on_keys_alone_breaks_on_repetitions() -> None:
    """The rule of release 0.1.0: what the erasure on the output side is for."""
    failed, _ = _grid(MemoryRule.one_sided(), REPETITIONS, 2048)
    assert failed > len(REPETITIONS)


@pytest.mark.parametrize("chunk", [16, 64])
def test_no_input_moves_a_memory_beyond_the_proven_limit(chunk: int) -> None:
    """Gradient ascent on the inputs, at the weights of initialisation and at larger ones."""
    shares = []
    for size in ATTACK_SIZES:
        found = attack(at_chunk(MemoryRule(), chunk), 32, *size, seed=0, num_steps=30, num_tokens=256)
        assert found["finite"] and found["over_limit"] <= 1, (size, found)
        shares.append(found["over_limit"])
    assert max(shares) > 0.5, f"{shares}: an attack that does not come near the limit tests nothing"


def test_without_a_bound_on_the_gradient_the_same_attack_breaks_a_trained_memory() -> None:
    found = attack(MemoryRule(gradient_bound=None), 32, *ATTACK_SIZES[-1], seed=0, num_steps=30, num_tokens=256)
    assert not found["finite"] or found["ratio"] > 100


def test_a_repeated_key_moves_a_memory_by_one_step_however_often_it_comes() -> None:
    """The bound of kernels/README.md: a chunk of equal keys writes (1 - (1 - lambda eta)^C) / lambda gradients."""
    for chunk in (4, 64):
        rule = MemoryRule(
            memory="matrix",
            adaptive=(),
            target="value",
            residual=False,
            chunk_mem=chunk,
            chunk_other=chunk,
            eta_max=0.5,
            gradient_bound=None,
        )
        model = _model(rule, eta_init=0.25, alpha_init=1 - 1e-9, conv_width=0)
        mixer = model.blocks[0].mixer
        with torch.no_grad():
            for gate in (mixer.memories.eta_slow, mixer.memories.alpha_slow):
                gate.zero_()
            _, state = mixer(model.embedding(torch.full((1, chunk), 3)), _packing(chunk), None)
            inputs = mixer._inputs(model.embedding(torch.full((1, 1), 3)), _packing(1), None)[0]
            k, v = (x[0, 0, 0] / x[0, 0, 0].norm() for x in (inputs.k, inputs.v))
            start = mixer.memories.mem_w2[0]
            steps = 1 - (1 - 0.25) ** chunk
            want = start + steps * torch.outer(v - start @ k, k)
            got = start + state.memory.run.w2[0, 0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _packing(num_tokens: int) -> Packing:
    return Packing.of((1, num_tokens))


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
