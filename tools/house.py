"""Rooms and arrows: the table in DESIGN.md, and the imports that the code makes.

The table is the only place where the arrows are written. `tests/test_house.py` checks the code against it and
`tools/picture.py` draws the picture. Source files are parsed and never imported. Standard library only.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
ALL_ABOVE = "all above"
NOT_PRODUCT = ("benchmarks", "tests")


@dataclass(frozen=True)
class Room:
    """One row of the table in DESIGN.md."""

    name: str
    paths: tuple[str, ...]
    """Folders (with a final slash) and files, relative to the repository's root."""
    knows: str
    """What the room is for, in a few words."""
    third_party: frozenset[str]
    """Top-level names of the packages outside the standard library that the room imports."""
    may_import: frozenset[str]
    """Names of the other rooms that the room may import."""


@dataclass(frozen=True)
class Import:
    """One import statement, or one `import_module` of a constant name."""

    path: str
    """The importing file, relative to the repository's root."""
    line: int
    target: str
    """The imported module; a package where the imported name is not a module of its own."""
    when: Literal["module", "function", "typing"]
    """At import of the file, when a function runs, or only for a type checker."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def read_table(design: str) -> dict[str, Room]:
    """The rooms of the table below `## Rooms and arrows`, in its order. Raises ValueError for a row that is not one."""
    section = design.partition("## Rooms and arrows")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rooms: dict[str, Room] = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5:
            raise ValueError(f"DESIGN.md: {line!r}: a row has five cells: room, files, knows, third-party, may import")
        name, files, knows, packages, arrows = cells
        may_import = set(rooms) if arrows == ALL_ABOVE else set(_words(arrows))
        if unknown := may_import - set(rooms):
            raise ValueError(f"DESIGN.md: {name}: {', '.join(sorted(unknown))}: not a room of a row above")
        paths = tuple(re.findall(r"`([^`]+)`", files))
        rooms[name] = Room(name, paths, knows, frozenset(_words(packages)), frozenset(may_import))
    if not rooms:
        raise ValueError("DESIGN.md: no table below '## Rooms and arrows'")
    return rooms


def _words(cell: str) -> list[str]:
    return [word.strip() for word in cell.split(",") if word.strip()]


class House:
    """The rooms, their files and every import between them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.rooms = read_table((root / "DESIGN.md").read_text())
        folders = {path.split("/")[0] for room in self.rooms.values() for path in room.paths}
        self.files = sorted(str(path.relative_to(root)) for folder in folders for path in (root / folder).rglob("*.py"))
        self._modules = {module_name(path): path for path in self.files}
        self.imports = [found for path in self.files for found in self._read(path)]

    def room_of(self, path: str) -> str:
        """The room of a file: that of the longest path in the table that covers it. Raises KeyError for none."""
        covering = [
            (len(part), room.name)
            for room in self.rooms.values()
            for part in room.paths
            if path == part or (part.endswith("/") and path.startswith(part))
        ]
        if not covering:
            raise KeyError(f"{path}: in no row of the table in DESIGN.md")
        return max(covering)[1]

    def file_of(self, module: str) -> str | None:
        """The file of a module of this repository; None for any other module."""
        return self._modules.get(module)

    def room_arrows(self) -> dict[str, set[str]]:
        """{room: the other rooms that it imports}, in functions and for type checkers too."""
        arrows: dict[str, set[str]] = {name: set() for name in self.rooms}
        for found in self.imports:
            target = self.file_of(found.target)
            if target and self.room_of(target) != self.room_of(found.path):
                arrows[self.room_of(found.path)].add(self.room_of(target))
        return arrows

    def module_arrows(self) -> dict[str, set[str]]:
        """{file: the files that it imports when it is itself imported}."""
        arrows: dict[str, set[str]] = {path: set() for path in self.files}
        for found in self.imports:
            target = self.file_of(found.target)
            if target and target != found.path and found.when == "module":
                arrows[found.path].add(target)
        return arrows

    def third_party(self) -> Iterator[tuple[str, str, Import]]:
        """(room, package, import) for every import of a package that is neither ours nor the standard library's."""
        ours = {path.split("/")[0] for path in self.files} | set(NOT_PRODUCT)
        for found in self.imports:
            package = found.target.split(".")[0]
            if package not in ours and package not in sys.stdlib_module_names:
                yield self.room_of(found.path), package, found

    def _read(self, path: str) -> Iterator[Import]:
        for node, when in _with_time(ast.parse((self.root / path).read_text()), "module"):
            for target in self._targets(node, path):
                yield Import(path, node.lineno, target, when)

    def _targets(self, node: ast.stmt | ast.expr, path: str) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                here = module_name(path).split(".")
                here = here if path.endswith("__init__.py") else here[:-1]
                package = ".".join([*here[: len(here) - node.level + 1], *package.split(".")]).strip(".")
            parts = [f"{package}.{alias.name}" for alias in node.names]
            return list(dict.fromkeys(part if part in self._modules else package for part in parts))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                return [str(node.args[0].value)]
        return []


def _with_time(
    node: ast.AST, when: Literal["module", "function", "typing"]
) -> Iterator[tuple[ast.stmt | ast.expr, Literal["module", "function", "typing"]]]:
    """Every statement and expression below `node`, with the time at which it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.expr):
            yield child, when
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _with_time(child, "typing" if when == "typing" else "function")
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            yield from _with_time(ast.Module(body=child.body, type_ignores=[]), "typing")
            yield from _with_time(ast.Module(body=child.orelse, type_ignores=[]), when)
        else:
            yield from _with_time(child, when)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def module_name(path: str) -> str:
    """`nltrain/store/__init__.py` -> `nltrain.store`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, each sorted; empty where nothing goes round in a circle."""
    reach = {node: _reachable(node, arrows) for node in arrows}
    parts = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in arrows}
    return sorted(list(part) for part in parts if len(part) > 1)


def _reachable(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in arrows[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen
