"""The house is built as DESIGN.md says: arrows, packages in their rooms, sizes, docstrings. Parses the code only."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tools import picture
from tools.house import ROOT, House, circles, read_table

HOUSE = House()
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_SHARED_LINES = 12
# "path:function": why it is longer than MAX_FUNCTION_LINES.
LONG_FUNCTIONS: dict[str, str] = {}


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


# ---- arrows ----------------------------------------------------------------------------------------------------------


def test_every_file_is_in_a_room_and_every_path_of_the_table_exists():
    for path in HOUSE.files:
        HOUSE.room_of(path)
    for room in HOUSE.rooms.values():
        assert room.paths, room.name
        for path in room.paths:
            assert (ROOT / path).exists(), f"{room.name}: {path}"


def test_every_folder_of_code_is_a_package():
    """`pip install .` leaves out a folder without __init__.py."""
    folders = {(ROOT / path).parent for path in HOUSE.files if path.startswith(("nltrain/", "kernels/"))}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_room_imports_against_the_arrows():
    against = []
    for found in HOUSE.imports:
        if target := HOUSE.file_of(found.target):
            here, there = HOUSE.room_of(found.path), HOUSE.room_of(target)
            if here != there and there not in HOUSE.rooms[here].may_import:
                against.append(f"{found}: {here} -> {there}")
    assert not against, "\n".join(against)


def test_every_arrow_of_the_table_is_used():
    # `all above` is for the entry points, which may use any room.
    arrows = HOUSE.room_arrows()
    unused = {
        f"{room.name} -> {other}"
        for room in HOUSE.rooms.values()
        if room.name not in ("cli", "jobs")
        for other in room.may_import - {"leaves"} - arrows[room.name]
    }
    assert not unused


def test_there_is_no_circle_between_rooms():
    assert circles(HOUSE.room_arrows()) == []


def test_there_is_no_circle_between_modules():
    assert circles(HOUSE.module_arrows()) == []


def test_a_package_is_imported_only_in_the_rooms_that_the_table_names():
    found: dict[str, set[str]] = defaultdict(set)
    for room, package, place in HOUSE.third_party():
        assert package in HOUSE.rooms[room].third_party, f"{place}: {room} has no {package} in DESIGN.md"
        found[room].add(package)
    for name, room in HOUSE.rooms.items():
        assert found[name] == room.third_party, name


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("deepspeed", {"levels"}),
        ("triton", {"kernels"}),
        ("boto3", {"store"}),
        ("botocore", {"store"}),
        ("ray", {"runtime", "local", "jobs"}),
        ("wandb", {"track"}),
        ("matplotlib", {"track"}),
    ],
)
def test_a_heavy_package_stays_in_its_room(package, rooms):
    allowed = rooms | {"jobs"} if package in ("boto3", "botocore") else rooms
    assert {room for room, name, _ in HOUSE.third_party() if name == package} <= allowed
    assert {room.name for room in HOUSE.rooms.values() if package in room.third_party} <= allowed


def test_product_code_imports_neither_tests_nor_benchmarks():
    wrong = [str(found) for found in HOUSE.imports if found.target.split(".")[0] in ("tests", "benchmarks")]
    assert not wrong


def test_benchmarks_do_not_import_tests():
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.split(".")[0] == "tests"
    ]
    assert not wrong


TORCH_ALONE = """
import importlib, importlib.abc, importlib.metadata, pkgutil, re, sys

def needed(name, seen):
    if name not in seen:
        seen.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return seen
        for line in requirements:
            if "extra ==" not in line:
                needed(re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-"), seen)
    return seen

allowed = needed("torch", set())
packages = importlib.metadata.packages_distributions()
blocked = {
    top for top, owners in packages.items()
    if not {owner.lower().replace("_", "-") for owner in owners} & (allowed | {"nltrain"})
}
tried = set()

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            tried.add(name)
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
for top in ("deepspeed", "ray", "boto3", "wandb", "numpy"):
    assert top in blocked, top
blocked.add("triton")  # torch names it among its needs where it is built for a GPU
kernels = set()
for name in ("kernels", "nltrain.model"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # The files that hold Triton's kernels need it, and nothing else does.
            assert module.name.startswith("kernels.triton_") and error.name == "triton", module.name
            kernels.add(module.name)
from nltrain.model import build, preset
assert kernels == {f"kernels.triton_{name}" for name in ("parts", "forward", "backward", "predict")}, kernels
print(sum(p.numel() for p in build(preset("hope", "tiny")).parameters()) > 0)
"""


def test_kernels_and_models_need_torch_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TORCH_ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


# ---- the checks themselves -------------------------------------------------------------------------------------------


def a_house(folder: Path, **files: str) -> House:
    head = "## Rooms and arrows\n| room | files | knows | third-party | may import |\n|---|---|---|---|---|\n"
    rows = "| low | `low/` | x | numpy | |\n| high | `high/`, `low/odd.py` | y | | low |\n"
    (folder / "DESIGN.md").write_text(head + rows)
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return House(folder)


def test_imports_are_found_wherever_they_stand(tmp_path):
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from high.b import B
else:
    import high.c
def f():
    from . import d
    import importlib
    importlib.import_module("high.e")
import numpy.linalg
"""
    others = dict.fromkeys(("high__b", "high__c", "low__d", "high__e", "low__odd"), "")
    house = a_house(tmp_path, low__a=text, **others)
    found = {(one.target, one.when) for one in house.imports}
    assert {
        ("high.b", "typing"),
        ("high.c", "module"),
        ("low.d", "function"),
        ("high.e", "function"),
        ("numpy.linalg", "module"),
    } <= found
    assert house.room_arrows() == {"low": {"high"}, "high": set()}
    assert house.module_arrows()["low/a.py"] == {"high/c.py"}
    assert [(room, package) for room, package, _ in house.third_party()] == [("low", "numpy")]
    assert house.room_of("low/odd.py") == "high"


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_a_table_with_an_arrow_upwards_is_refused():
    table = (
        "## Rooms and arrows\n|a|b|c|d|e|\n|-|-|-|-|-|\n| low | `low/` | x | | high |\n| high | `high/` | y | | low |\n"
    )
    with pytest.raises(ValueError, match="high: not a room of a row above"):
        read_table(table)


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_the_one_that_the_imports_give():
    assert picture.draw(HOUSE) == (ROOT / "docs" / "architecture.svg").read_text(), "run `make picture`"


def test_an_arrow_that_a_longer_way_implies_is_not_drawn():
    assert picture.without_implied({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_a_lane_is_kept_free_for_an_arrow_over_several_layers():
    layers, ways = picture.layered({"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set(), "e": {"b", "c"}})
    assert [sorted(layer) for layer in layers] == [["a", "e"], ["b", "d", "e>c@1"], ["c"]]
    assert ["e", "e>c@1", "c"] in ways


# ---- sizes, docstrings, repetitions ----------------------------------------------------------------------------------


def test_no_file_is_longer_than_450_lines():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in HOUSE.files}
    assert {path: n for path, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    sizes = {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in HOUSE.files
        for node in functions(path)
    }
    long = {name: n for name, n in sizes.items() if n > MAX_FUNCTION_LINES}
    assert set(LONG_FUNCTIONS) <= set(long), "no longer an exception"
    assert {name: n for name, n in long.items() if name not in LONG_FUNCTIONS} == {}


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring; `__init__` and operators are not counted."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


def test_every_public_definition_has_a_docstring():
    missing = []
    for path in HOUSE.files:
        if tree(path).body and ast.get_docstring(tree(path)) is None:
            missing.append(path)
        missing += undocumented(tree(path).body, f"{path}:")
    assert not missing, "\n".join([f"{len(missing)} without a docstring:", *missing])


def test_no_two_places_share_more_than_12_lines():
    """Imports, comments and blank lines are not counted."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in HOUSE.files:
        imported = {
            line
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        text = [
            (n, line.strip()) for n, line in enumerate((ROOT / path).read_text().splitlines(), 1) if n not in imported
        ]
        code = [(n, line) for n, line in text if line and not line.startswith("#")]
        for i in range(len(code) - MAX_SHARED_LINES):
            window = code[i : i + MAX_SHARED_LINES + 1]
            places[tuple(line for _, line in window)].append(f"{path}:{window[0][0]}")
    shared = [" = ".join(where) for where in places.values() if len(where) > 1]
    assert not shared, "\n".join(shared)
