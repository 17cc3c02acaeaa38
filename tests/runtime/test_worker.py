"""Wishes that a rank leaves, as they reach its process; and that no module of this room needs the other way round."""

import ast
import math
import signal
from pathlib import Path

import pytest

from nltrain.runtime import leaving
from nltrain.runtime.leaving import Asked, ask_to_leave, on_sigterm, wait_until_left
from nltrain.supervision import Wish

ROOM = Path(__file__).resolve().parents[2] / "nltrain" / "runtime"


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a rank that nobody has asked anything."""
    monkeypatch.setattr(Asked, "wish", Wish.GO_ON)
    monkeypatch.setattr(Asked, "killed_s", math.inf)
    for name in ("training", "left"):
        monkeypatch.setattr(Asked, name, leaving.threading.Event())


def test_of_several_wishes_the_largest_counts_and_of_several_times_the_first() -> None:
    ask_to_leave(Wish.STOP, 100.0)
    first_s = Asked.killed_s
    ask_to_leave(Wish.RESIZE)
    assert (Asked.wish, Asked.killed_s) == (Wish.STOP, first_s)
    ask_to_leave(Wish.PREEMPTED, 10.0)
    assert Asked.wish is Wish.STOP and Asked.killed_s < first_s


def test_sigterm_asks_a_rank_that_trains_to_save_and_ends_one_that_does_not() -> None:
    with pytest.raises(SystemExit) as ended:
        on_sigterm(signal.SIGTERM, None)
    assert ended.value.code == 128 + signal.SIGTERM
    assert Asked.wish is Wish.GO_ON
    Asked.training.set()
    on_sigterm(signal.SIGTERM, None)
    assert Asked.wish is Wish.PREEMPTED and Asked.killed_s == math.inf


def test_the_controller_waits_until_the_rank_has_left() -> None:
    assert not wait_until_left(0.01)
    Asked.left.set()
    assert wait_until_left(0.01)


def imports_of(module: str) -> set[str]:
    """The modules of this room that `module` imports, anywhere in its text."""
    nodes = list(ast.walk(ast.parse((ROOM / f"{module}.py").read_text())))
    found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in found if name.startswith("nltrain.local")], f"{module} imports the room `local`"
    return {name.rpartition(".")[2] for name in found if name.startswith("nltrain.runtime.")}


def test_the_modules_of_this_room_import_each_other_in_one_direction() -> None:
    left = {path.stem: imports_of(path.stem) for path in ROOM.glob("*.py") if path.stem != "__init__"}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle: {left}"
