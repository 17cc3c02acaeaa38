"""An optimizer stands in one file: config, plan, engine and checkpoints take a new one from the registry alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks._level_toys import SEQ_LEN, Toy, batch, gathered, levels, train
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelConfig, LevelsError
from nltrain.levels.optimizers import FROZEN, OPTIMIZERS, LevelOptimizer, OptimizerSettings, optimizer_of
from nltrain.levels.scheduler import LevelScheduler

LR = 1e-2


class SignStep(torch.optim.Optimizer):
    """p -= lr sign(g)."""

    def __init__(self, groups: list[dict[str, Any]], lr: float):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


class SignSGD(LevelOptimizer):
    """What adding an optimizer takes."""

    name = "sign_sgd"

    def state_names(self, settings: OptimizerSettings) -> tuple[str, ...]:
        return ()

    def create(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
    ) -> torch.optim.Optimizer:
        return SignStep(groups, settings.lr)


@pytest.fixture
def sign_sgd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(OPTIMIZERS, "sign_sgd", SignSGD())
    return None


def level(**settings: Any) -> LevelConfig:
    return LevelConfig("base", ("rest",), 64, **settings)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_state_created_before_the_first_step_is_what_the_first_step_would_create(settings):
    made = level(**settings)
    optimizer, weight = optimizer_of(made), nn.Parameter(torch.ones(6))
    stepped, fresh = (optimizer.create([{"params": [weight]}], made, torch.device("cpu")) for _ in range(2))
    weight.grad = torch.ones(6)
    stepped.step()
    optimizer.create_state(fresh, [weight], made)
    created = {key for key, value in fresh.state[weight].items() if value is not None}
    assert created == {key for key, value in stepped.state[weight].items() if value is not None}
    sized = {key for key in created if fresh.state[weight][key].shape == weight.shape}
    assert sized == set(optimizer.state_names(made))
    assert optimizer.state_bytes(made) == 4 * len(sized)
    assert optimizer.steps(stepped, [weight]) == ("step" in created)
    optimizer.set_steps(fresh, [weight], optimizer.steps(stepped, [weight]))
    assert optimizer.steps(fresh, [weight]) == optimizer.steps(stepped, [weight])


def test_a_frozen_level_has_no_optimizer_state():
    assert optimizer_of(level(frozen=True)) is FROZEN and FROZEN.state_bytes(level(frozen=True)) == 0


def test_a_new_optimizer_is_accepted_and_its_settings_are_checked_by_the_registry_alone(sign_sgd):
    assert optimizer_of(level(optimizer="sign_sgd")).state_bytes(level(optimizer="sign_sgd")) == 0
    with pytest.raises(LevelsError, match="offload=True: sign_sgd keeps no optimizer state: use adamw, or"):
        level(optimizer="sign_sgd", offload=True)
    with pytest.raises(LevelsError, match="choose one of adamw, sgd, sign_sgd"):
        level(optimizer="sign")


def one_tick(stages: tuple[int, ...], ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter: (signs of the change of one tick, gradient)} with an optimizer that the package does not know."""
    OPTIMIZERS["sign_sgd"] = SignSGD()
    quantum = 2 * ranks.world_size * SEQ_LEN
    config = levels(quantum, (1, 1, 1, 1), stages, {"optimizer": "sign_sgd", "lr": LR, "clip_norm": None})
    model = Toy()
    scheduler = LevelScheduler(model, config, SEQ_LEN)
    train(model, scheduler, ranks.rank, ranks.world_size, range(1), 2)
    weights = gathered(scheduler)
    kinds = {name.rsplit(".", 1)[1] for name in scheduler.fragments()}
    scheduler.close()
    del OPTIMIZERS["sign_sgd"]
    assert kinds == {"master", "initial"}
    reference = Toy()
    reference.loss(*batch(range(2 * ranks.world_size))).backward()
    return {
        name: ((p.detach() - weights[name]) / LR, p.grad) for name, p in reference.named_parameters() if not ranks.rank
    }


STAGES = {"mix3211": (3, 2, 1, 1)}
CASES = {2: {f"sign-{name}": partial(one_tick, stages) for name, stages in STAGES.items()}}


@pytest.mark.parametrize("stages", STAGES)
def test_a_new_optimizer_trains_at_every_stage(case, stages):
    for name, (change, gradient) in case(2, f"sign-{stages}").items():
        clear = gradient.abs() > 1e-5  # not decided by the order of summation
        assert clear.any(), name
        assert torch.equal(change[clear].round(), gradient[clear].sign()), name
