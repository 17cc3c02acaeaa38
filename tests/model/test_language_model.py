"""Properties every family keeps: causality, streaming, documents, gradients everywhere, loss and generation."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._memory_cases import DEVICE
from nltrain.model import LanguageModel, ModelConfig, build
from tests.model.configs import ALL_CONFIGS, small

NUM_TOKENS = 40


def _model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return build(config).double().to(DEVICE)


def _tokens(num_sequences: int = 3, num_tokens: int = NUM_TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, 23, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _starts(num_sequences: int = 3, num_tokens: int = NUM_TOKENS) -> Tensor:
    """Documents that begin inside, at and next to chunk boundaries, differently in each row."""
    starts = torch.zeros(num_sequences, num_tokens, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, [5, 6, 16]] = True
    starts[1, [8, 31]] = True
    return starts.to(DEVICE)


def _logits(model: LanguageModel, tokens: Tensor, starts: Tensor | None, pieces: list[int] | None) -> Tensor:
    if pieces is None:
        return model(tokens, starts)[0]
    out, state, begin = [], None, 0
    for length in pieces:
        span = slice(begin, begin + length)
        logits, state = model(tokens[:, span], None if starts is None else starts[:, span], state)
        out.append(logits)
        begin += length
    return torch.cat(out, 1)


PIECES = [1, 7, 1, 8, 3, 13, 7]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_sequence_in_pieces_equals_one_call(name: str) -> None:
    model = _model(ALL_CONFIGS[name])
    for starts in (None, _starts()):
        whole = _logits(model, _tokens(), starts, None)
        torch.testing.assert_close(_logits(model, _tokens(), starts, PIECES), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_packed_document_equals_the_document_alone(name: str) -> None:
    model = _model(ALL_CONFIGS[name])
    tokens, starts = _tokens(), _starts()
    packed = _logits(model, tokens, starts, None)
    for row in range(tokens.shape[0]):
        begins = [*starts[row].nonzero().flatten().tolist(), NUM_TOKENS]
        for begin, end in pairwise(begins):
            alone = model(tokens[row : row + 1, begin:end])[0][0]
            torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL_CONFIGS)
@pytest.mark.parametrize("pieces", [None, PIECES], ids=["one_call", "streamed"])
def test_a_token_changes_no_output_before_it(name: str, pieces: list[int] | None) -> None:
    model = _model(ALL_CONFIGS[name])
    for starts in (None, _starts()):
        tokens = _tokens()
        before = _logits(model, tokens, starts, pieces)
        for t in (1, 5, 8, 15, 31, 39):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 23
            after = _logits(model, changed, starts, pieces)
            assert torch.equal(after[:, :t], before[:, :t]), t
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(name: str) -> None:
    config = ALL_CONFIGS[name]
    assert config.w1_std == 0.02 and config.down_init == "zero"
    model = _model(config)
    tokens = _tokens(2, 5 * 8)
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    # `down` starts from zero: what lies before it gets its gradient once `down` has moved, and not earlier.
    before_down = [n for n, _ in model.named_parameters() if n.endswith((".gate.weight", ".up.weight", ".norm.weight"))]
    before_down = [n for n in before_down if ".cms." in n or ".ffn." in n]
    assert before_down
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in before_down:
            assert not parameter.grad.any(), parameter_name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad / parameter.grad.norm().clamp_min(1e-9)
            parameter.grad = None
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_only_leaf_modules_own_parameters(name: str) -> None:
    """A sharded engine per level gathers whole leaf modules."""
    model = build(ALL_CONFIGS[name])
    for module_name, module in model.named_modules():
        if list(module.children()):
            assert not list(module.parameters(recurse=False)), module_name


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_leaves_read_their_parameters_only_inside_their_own_forward(name: str) -> None:
    """What a sharded engine relies on: outside the owner's forward the parameters may be empty.

    Hooks fill the parameters just before each leaf runs and scramble them just after; results must not notice.
    """
    model = _model(ALL_CONFIGS[name])
    tokens = _tokens(2)
    with torch.no_grad():
        want = model.loss(tokens, tokens, _starts(2))
        for leaf in (m for m in model.modules() if list(m.parameters(recurse=False))):
            values = [p.clone() for p in leaf.parameters()]

            def fill(module: torch.nn.Module, *_: object, values: list[Tensor] = values) -> None:
                for p, v in zip(module.parameters(), values, strict=True):
                    p.copy_(v)

            def scramble(module: torch.nn.Module, *_: object) -> None:
                for p in module.parameters():
                    p.fill_(torch.nan)

            scramble(leaf)
            leaf.register_forward_pre_hook(fill)
            leaf.register_forward_hook(scramble)
        assert torch.equal(model.loss(tokens, tokens, _starts(2)), want)


def test_loss_is_the_fp32_sum_over_real_targets() -> None:
    model = _model(small("hope")).float()
    tokens = _tokens()
    targets = tokens.roll(-1, 1)
    targets[0, 3:9] = -100
    loss = model.loss(tokens, targets)
    log_p = model(tokens)[0].log_softmax(-1)
    real = targets != -100
    want = -log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)[real].sum()
    assert loss.dtype == torch.float32 and loss.dim() == 0
    torch.testing.assert_close(loss, want)
    nothing = model.loss(tokens, torch.full_like(tokens, -100))
    nothing.backward()
    assert nothing == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["hope", "transformer"])
def test_greedy_generation_equals_scoring_the_whole_prefix(family: str) -> None:
    model = _model(small(family))
    prompt = _tokens(2, 11)
    out = model.generate(prompt, 12, temperature=0.0)
    assert torch.equal(out[:, :11], prompt) and out.shape == (2, 23)
    for t in range(11, 23):
        assert torch.equal(model(out[:, :t])[0][:, -1].argmax(-1), out[:, t])


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_prompt_read_in_pieces_equals_one_call(name: str) -> None:
    model = _model(ALL_CONFIGS[name])
    tokens = _tokens()
    want = model(tokens)[0][:, -1]
    for piece in (1, 7, 16, 100):
        logits, state = model.read(tokens, piece=piece)
        torch.testing.assert_close(logits, want, rtol=1e-11, atol=1e-11)
        assert (state.position == NUM_TOKENS).all()
    with pytest.raises(ValueError, match="at least 1"):
        model.read(tokens[:, :0])


def test_reading_a_prompt_costs_the_memory_of_one_piece() -> None:
    """The largest tensor of a call does not grow with the prompt, whatever its length."""

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.values = max(self.values, out.numel())
            return out

    model, found = _model(small("hope")), []
    for num_tokens in (64, 1024):
        with Largest() as largest:
            model.read(_tokens(1, num_tokens), piece=32)
        found.append(largest.values)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["hope", "hope_momentum", "transformer_conv"])
def test_the_loss_in_pieces_equals_the_loss_in_one_call(name: str) -> None:
    model = _model(ALL_CONFIGS[name])
    tokens, starts = _tokens(), _starts()
    targets = tokens.roll(-1, 1)
    want, total, state, begin = model.loss(tokens, targets, starts), 0.0, None, 0
    for length in PIECES:
        span = slice(begin, begin + length)
        loss, state = model.loss_with_state(tokens[:, span], targets[:, span], starts[:, span], state)
        total, begin = total + loss, begin + length
    torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-6)


def test_sampling_follows_its_generator() -> None:
    model = _model(small("hope"))
    draws = [model.generate(_tokens(1, 5), 20, 1.0, torch.Generator(DEVICE).manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", ["hope", "titans", "matrix", "transformer"])
def test_bf16_parameters_train_and_stay_near_fp32(name: str) -> None:
    model = _model(ALL_CONFIGS[name]).float()
    tokens = _tokens()
    want = model.loss(tokens, tokens)
    loss = model.bfloat16().loss(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - want) / want < 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "recompute"), [("hope", "chunks"), ("hope", "block"), ("titans", "block"), ("transformer", "block")]
)
def test_recomputing_changes_no_gradient(family: str, recompute: str) -> None:
    tokens, starts = _tokens(2, 72), _starts(2, 72)
    gradients = []
    for choice in ("none", recompute):
        model = _model(small(family, recompute=choice))
        first, state = model.loss_with_state(tokens[:, :30], tokens[:, :30], starts[:, :30])
        second, _ = model.loss_with_state(tokens[:, 30:], tokens[:, 30:], starts[:, 30:], state)
        (first + second + model.loss(tokens, tokens, starts)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_recomputed_blocks_learn_below_a_frozen_embedding() -> None:
    tokens, gradients = _tokens(2), []
    for recompute in ("none", "block"):
        model = _model(small("hope", recompute=recompute))
        model.embedding.requires_grad_(False)
        model.loss(tokens, tokens).backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_truncation_cuts_the_gradient_through_old_states_only() -> None:
    tokens = _tokens(2)
    losses, gradients = [], []
    for truncate in (None, 100, 1):
        model = _model(small("hope", truncate_chunks=truncate))
        loss = model.loss(tokens, tokens)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.blocks[0].mixer.k.weight.grad)
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])
