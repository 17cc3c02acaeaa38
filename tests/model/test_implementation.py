"""ModelConfig.kernel, compile and compile_backend: other code, the same numbers, and allowed to change on resume."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from benchmarks._memory_cases import DEVICE
from kernels import compiler
from nltrain.errors import ConfigError
from nltrain.model import ModelConfig, build
from nltrain.model.config import IMPLEMENTATION_FIELDS
from tests.model.configs import ALL_CONFIGS, small

MEMORIES = [name for name, config in ALL_CONFIGS.items() if config.family in ("hope", "titans", "matrix")]


def _batch(num_tokens: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 23, (2, num_tokens), generator=generator).to(DEVICE)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [5, 11]] = True
    return tokens, starts


def _loss_and_gradients(config: ModelConfig, starts: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    model = build(replace(config, down_init="small")).double().to(DEVICE)
    tokens, _ = _batch()
    loss = model.loss(tokens, tokens.roll(-1, 1), starts)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MEMORIES)
def test_the_token_loop_trains_the_same_model(name: str) -> None:
    config = replace(ALL_CONFIGS[name], num_layers=1)
    for starts in (None, _batch()[1]):
        _assert_equal(_loss_and_gradients(replace(config, kernel="naive"), starts), _loss_and_gradients(config, starts))


def test_the_token_loop_continues_a_state() -> None:
    torch.manual_seed(0)
    model = build(small("hope", kernel="naive")).double().to(DEVICE)
    tokens, starts = _batch()
    whole = model(tokens, starts)[0]
    first, state = model(tokens[:, :9], starts[:, :9])
    second, _ = model(tokens[:, 9:], starts[:, 9:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("family", "mode"), [("hope", "steps"), ("hope", "blocks"), ("transformer", "blocks")])
def test_compiled_parts_train_the_same_model(family: str, mode: str) -> None:
    torch.compiler.reset()
    config = small(family, num_layers=1)
    compiled = replace(config, compile=mode, compile_backend="aot_eager")
    _assert_equal(_loss_and_gradients(compiled), _loss_and_gradients(config))
    torch.compiler.reset()


@pytest.mark.parametrize(("family", "mode"), [("hope", "steps"), ("hope", "blocks"), ("transformer", "blocks")])
def test_a_back_end_that_torch_lacks_is_refused(family: str, mode: str) -> None:
    with pytest.raises(compiler.CompilerError, match=r"compile_backend = 'nonesuch': torch has no back end"):
        build(small(family, compile=mode, compile_backend="nonesuch")).to(DEVICE)(_batch()[0])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("hope", {"kernel": "fast"}, "model.kernel='fast': choose one of auto, triton, chunk, naive"),
        ("hope", {"kernel": "naive", "recompute": "chunks"}, "model.kernel='naive': the token loop has no recompute"),
        (
            "hope",
            {"kernel": "naive", "compile": "steps"},
            "model.kernel='naive': the token loop has no compile",
        ),
        (
            "hope",
            {"compile": "steps", "recompute": "block"},
            "model.recompute='block': torch.compile's code does not run",
        ),
        ("hope", {"compile": "all"}, "model.compile='all': choose none, steps or blocks"),
        ("transformer", {"kernel": "chunk"}, "model.kernel='chunk': transformer has no memories; use auto"),
        ("transformer", {"recompute": "chunks"}, "model.recompute='chunks': transformer has no chunk loop"),
        ("transformer", {"compile": "steps"}, "model.compile='steps': transformer has no chunk loop"),
    ],
)
def test_an_implementation_that_cannot_be_is_refused_by_name(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(family, **changes)
    assert str(caught.value).startswith(message)


def test_these_fields_and_no_others_of_the_implementation_may_change_on_resume() -> None:
    marked = {each.name for each in fields(ModelConfig) if each.metadata.get("may_change") == "always"}
    assert marked - {"recompute"} == set(IMPLEMENTATION_FIELDS)


def test_a_saved_model_is_read_with_the_implementation_of_here() -> None:
    then = small("hope", kernel="naive", compile_backend="nonesuch")
    assert ModelConfig.from_saved(then.to_dict()) == small("hope")
    old = {name: value for name, value in small("hope").to_dict().items() if name not in IMPLEMENTATION_FIELDS}
    assert ModelConfig.from_saved(old) == ModelConfig.from_dict(old) == small("hope")
