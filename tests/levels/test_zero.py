"""Both adapters behave the same: masters, layouts, a step, and the weights that the model computes with."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nltrain
from benchmarks._ranks import Ranks
from nltrain.levels.config import LevelConfig, LevelsConfig
from nltrain.levels.groups import arrange
from nltrain.levels.ledger import Ledger
from nltrain.levels.optimizers import optimizer_of
from nltrain.levels.split import split_levels
from nltrain.levels.zero import _replaced, init_deepspeed, shard


def stepped(stage: int, ranks: Ranks) -> dict[str, list[Tensor]]:
    """Outputs of a linear map before a step, after it, and with masters set to 0.5; x = 1, gradients = 1, lr = 0.25."""
    device, ledger = torch.device("cpu"), Ledger()
    init_deepspeed(device)
    model = nn.Sequential(nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    level = LevelConfig("all", ("*",), 8, optimizer="sgd", lr=0.25, zero_stage=stage)
    levels = LevelsConfig((level,))
    (part,) = split_levels(model, (level,))
    optimizer = optimizer_of(level)
    groups = arrange(part.parameters, 10, optimizer)  # weight and bias apart
    members = [{"params": list(group.parameters)} for group in groups]
    adapter = shard(part, groups, optimizer.create(members, level, device), levels, ledger)

    def output() -> Tensor:
        adapter.before_forward()
        found = model(torch.ones(5)).detach().clone()
        adapter.before_backward()
        adapter.after_backward()
        return found

    outputs = [output()]
    covered = [sum(span.length for span in layout.spans(ranks.rank)) for layout in adapter.layouts]
    with torch.no_grad():
        adapter.step([torch.ones_like(master) for master in adapter.masters])
        outputs.append(output())
        for master in adapter.masters:
            master.data.fill_(0.5)
        adapter.write_forward_weights()
    outputs.append(output())
    adapter.close()
    ledger.close()
    total = torch.tensor(covered)
    dist.all_reduce(total)
    return {"outputs": outputs, "covered": [total]}


STAGES = (1, 2, 3)
CASES = {2: {f"zero-{stage}": partial(stepped, stage) for stage in STAGES}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_and_new_masters_reach_the_weights_that_the_model_computes_with(case, stage):
    result = case(2, f"zero-{stage}")
    assert [output.tolist() for output in result["outputs"]] == [[6.0] * 3, [4.5] * 3, [3.0] * 3]
    assert result["covered"][0].tolist() == [15, 3]


def test_a_replaced_attribute_comes_back_after_an_error_too():
    class Owner:
        name = "before"

    with pytest.raises(RuntimeError), _replaced(Owner, "name", "inside"):
        assert Owner.name == "inside"
        raise RuntimeError
    assert Owner.name == "before"


def test_only_one_file_imports_deepspeed_and_no_file_imports_mock():
    package = Path(nltrain.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    importing = {name for name, text in texts.items() if re.search(r"^\s*(import|from) deepspeed", text, re.M)}
    assert importing == {"levels/zero.py"}
    assert not [name for name, text in texts.items() if re.search(r"^\s*(import|from) unittest", text, re.M)]
