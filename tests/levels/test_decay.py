"""Weight decay: what no_decay names is left alone to the bit, the rest decays as in torch's AdamW, at every stage."""

from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._level_toys import SEQ_LEN, VOCAB, gathered, train, train_dense, worst_error
from benchmarks._ranks import Ranks
from nltrain.levels.config import NO_DECAY, LevelConfig, LevelsConfig, LevelsError
from nltrain.levels.layout import FlatLayout, RowLayout, joined
from nltrain.levels.scheduler import LevelScheduler
from nltrain.levels.split import split_levels

WIDTH, SEQUENCES, LR, DECAY = 13, 6, 1e-2, 0.5


class Memories(nn.Module):
    """Matrices per head, a gate bias that is a matrix too, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(3, WIDTH, WIDTH))
        self.gate_bias = nn.Parameter(torch.randn(3, WIDTH))
        self.gain = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.einsum("btd,hed->bte", x, self.w.tanh()) + self.gate_bias.sum(0)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.memories = Memories()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        return x + self.memories(self.conv(y.mT).mT)


class Model(nn.Module):
    """Between two parameters that decay lies always one that does not, so that a shard is cut into many slices."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.quick, self.slow, self.head = Part(), Part(), nn.Linear(WIDTH, VOCAB)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.slow(self.quick(self.embedding(tokens))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def config(stage: int, decay: float, slow_no_decay: tuple[str, ...] = NO_DECAY) -> LevelsConfig:
    shared = {"period_tokens": SEQUENCES * SEQ_LEN, "lr": LR, "weight_decay": decay, "zero_stage": stage}
    base = LevelConfig("base", ("rest",), **shared)
    slow = LevelConfig("slow", ("slow.*",), no_decay=slow_no_decay, **shared)
    return LevelsConfig((base, slow), bucket_elements=700)


def spared(name: str, parameter: nn.Parameter, patterns: tuple[str, ...]) -> bool:
    return ("vectors" in patterns and parameter.ndim < 2) or any(fnmatchcase(name, p) for p in patterns)


def against_torch(stage: int, ranks: Ranks) -> float:
    """Worst error over 8 ticks against one torch AdamW with a group that decays and one that does not, per level."""
    slow_no_decay = ("*.up.weight", "vectors")
    made, model = config(stage, DECAY, slow_no_decay), Model()
    scheduler = LevelScheduler(model, made, SEQ_LEN)
    train(model, scheduler, ranks.rank, ranks.world_size, range(8), micro_batch=2)
    weights = gathered(scheduler)
    scheduler.close()
    if ranks.rank:
        return 0.0
    reference = Model()
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, p in reference.named_parameters():
        level = "slow" if name.startswith("slow.") else "base"
        out = spared(name, p, slow_no_decay if level == "slow" else NO_DECAY)
        groups.setdefault((level, out), []).append(p)
    optimizers = {
        level: torch.optim.AdamW(
            [{"params": groups[level, out], "weight_decay": 0.0 if out else DECAY} for out in (True, False)],
            lr=LR,
            betas=made.levels[0].betas,
        )
        for level in ("base", "slow")
    }
    dense = _TwoGroups(optimizers)
    train_dense(reference, made, range(8), micro_batch=2, world_size=1, dense=dense)
    return worst_error(weights, reference.named_parameters())


class _TwoGroups:
    """What `train_dense` feeds: mean over the quantum, clip by torch, one torch optimizer per level."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]):
        self.optimizers, self.targets = optimizers, 0

    def micro_step(self, loss_sum: Tensor, num_targets: int) -> None:
        loss_sum.backward()
        self.targets += num_targets

    def finish_quantum(self) -> None:
        for optimizer in self.optimizers.values():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for p in parameters:
                p.grad.div_(self.targets)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        self.targets = 0


def one_tick(stage: int, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Weights after one tick with decay and without: the gradients are the same, so that only decay differs."""
    found = {}
    for name, decay in (("with", DECAY), ("without", 0.0)):
        model = Model()
        scheduler = LevelScheduler(model, config(stage, decay), SEQ_LEN)
        train(model, scheduler, ranks.rank, ranks.world_size, range(1), micro_batch=2)
        found[name] = gathered(scheduler)
        scheduler.close()
    return found


STAGES, WORLD_SIZES = (1, 2, 3), (2, 3)
CASES = {
    world: {f"decay-torch-{s}": partial(against_torch, s) for s in STAGES}
    | {f"decay-tick-{s}": partial(one_tick, s) for s in STAGES}
    for world in WORLD_SIZES
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_decay_equals_torchs_adamw_with_a_group_that_decays_and_one_that_does_not(case, world_size, stage):
    assert case(world_size, f"decay-torch-{stage}") <= 5e-6  # as in test_parity


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_must_not_decay_is_the_same_to_the_bit_with_decay_and_without(case, world_size, stage):
    result = case(world_size, f"decay-tick-{stage}")
    left_alone = {name for name, value in result["with"].items() if torch.equal(value, result["without"][name])}
    assert left_alone == {name for name, p in Model().named_parameters() if spared(name, p, NO_DECAY)}
    assert set(result["with"]) - left_alone == {
        "embedding.weight", "quick.up.weight", "slow.up.weight", "head.weight",
    }  # fmt: skip


@pytest.mark.parametrize("layout", [FlatLayout([5, 1, 7, 3], 3, 6), RowLayout([5, 1, 7, 3], 3)])
def test_slices_cover_exactly_the_wanted_elements_of_every_shard(layout):
    total = 0
    for rank in range(3):
        covered = [offset + i for offset, length in joined(layout.spans(rank), {0, 2, 3}) for i in range(length)]
        wanted = [p.offset + i for p in layout.spans(rank) if p.parameter != 1 for i in range(p.length)]
        assert covered == wanted
        total += len(covered)
    assert total == 5 + 7 + 3


def test_the_plan_tells_what_decays_and_which_pattern_spares_the_rest():
    base, slow = split_levels(Model(), config(1, DECAY, ("slow.up.*", "vectors")).levels)
    sizes = {name: p.numel() for name, p in Model().named_parameters()}
    decayed = sizes["embedding.weight"] + sizes["quick.up.weight"] + sizes["head.weight"]
    assert base.num_decayed == decayed
    text = base.describe_decay()
    assert text.startswith(f"decay 0.5 on {decayed:,} of {base.num_parameters:,} parameters; not on vectors (")
    assert f"*conv.* ({sizes['quick.conv.weight']:,})" in text and "*memories.*" in text and "slow" not in text
    assert f"slow.up.* ({sizes['slow.up.weight'] + WIDTH:,})" in slow.describe_decay()
    assert split_levels(Model(), config(1, 0.0).levels)[0].describe_decay() == "no decay"


def test_a_pattern_of_no_decay_must_match_a_parameter_of_the_model_but_not_of_its_level():
    split_levels(Model(), config(1, DECAY, ("embedding.*",)).levels)
    split_levels(nn.Sequential(nn.Linear(2, 2, bias=False)), (LevelConfig("base", ("rest",), 64, weight_decay=0.1),))
    with pytest.raises(LevelsError, match=r"'slow': no_decay pattern 'embeding\.\*' matches no trainable parameter"):
        split_levels(Model(), config(1, DECAY, ("embeding.*",)).levels)


def test_a_tied_weight_is_spared_by_any_of_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    (part,) = split_levels(model, (LevelConfig("base", ("rest",), 64, weight_decay=0.1, no_decay="head.*"),))
    assert part.num_decayed == 0 and dict(part.spared) == {"embed.weight": "head.*"}
