"""docs/when-it-fails.md, 'Preparing data': its messages are those of the code, and those of the code are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUE = "…"
PAGE = (ROOT / "docs" / "when-it-fails.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Preparing data\n")[2].partition("\n## ")[0]
ERRORS = {"DataError", "StoreError", "MissingObjectError", "PlaceError", "ConfigError"}
SOURCES = [
    *(ROOT / "nltrain" / "data" / "prepare").glob("*.py"),
    *(ROOT / "nltrain" / "store").glob("*.py"),
    ROOT / "nltrain" / "data" / "tokenizer.py",
    ROOT / "jobs" / "prepare_shards.py",
]


def text_of(node: ast.AST) -> str:
    """A string of the program with VALUE for what it fills in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return VALUE


def said_to_users(tree: ast.Module) -> set[str]:
    """The messages of errors, and the reasons for which a record is dropped or a file passed over."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in ERRORS or name == "Bad":
            found.add(text_of(node.args[0]))
        elif name == "require":
            field, _, remedy = map(text_of, node.args[1:])
            found.add(f"{field}={VALUE}: {remedy}")
        elif name == "add" and len(node.args) == 2:
            found.add(text_of(node.args[1]))
    return {" ".join(text.split()) for text in found if text.replace(VALUE, "").strip(" :")}


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in re.split(f"{VALUE}+", message)))


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
SAID = sorted(set().union(*map(said_to_users, TREES)))
STRINGS = {" ".join(text_of(node).split()) for tree in TREES for node in ast.walk(tree)}.union(SAID)
DOCUMENTED = [
    match[1]
    for entry in re.findall(r"^- (.*?)(?=^- |^#|\Z)", SECTION, re.DOTALL | re.MULTILINE)
    # The messages come first, one or several; what follows the last colon explains them.
    for match in re.finditer(r"(?:^|,\s+)`(.+?)`(?=[:,])", " ".join(entry.split()))
]


def test_the_page_has_messages() -> None:
    assert len(DOCUMENTED) > 80 and len(SAID) > 60
    assert all(f"`{message}`" in " ".join(SECTION.split()) for message in DOCUMENTED)


@pytest.mark.parametrize("message", DOCUMENTED)
def test_a_message_of_the_page_is_one_of_the_code(message: str) -> None:
    assert any(pattern(message).fullmatch(string) for string in STRINGS), message


@pytest.mark.parametrize("message", SAID)
def test_a_message_of_the_code_is_on_the_page(message: str) -> None:
    # With nothing but values in it a message of the page would explain everything.
    shown = [entry for entry in DOCUMENTED if entry.replace(VALUE, "").strip(" :")]
    assert any(pattern(entry).fullmatch(message) for entry in shown), message
