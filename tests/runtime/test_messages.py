"""docs/when-it-fails.md, 'Running': its messages are those of the code, and those of the code are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUE = "…"
PAGE = (ROOT / "docs" / "when-it-fails.md").read_text()
SECTION = PAGE.partition("## Running\n")[2].partition("\n## ")[0]
# Where each error that a user can meet has to be explained.
EXPLAINED = [
    *(f"nltrain/runtime/{name}.py" for name in ("config", "launch", "preflight", "status")),
    *(f"nltrain/local/{name}.py" for name in ("cluster", "demo", "environment", "own_ray")),
    "nltrain/config.py", "nltrain/track/record.py", "nltrain/resume.py", "nltrain/run.py",
]  # fmt: skip
ALSO = ["nltrain/checkpoint", "nltrain/track", "nltrain/places.py", "nltrain/data", "nltrain/store", "nltrain/local"]


def text_of(node: ast.AST) -> str:
    """A string of the program with VALUE for what it fills in; empty where it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ""


def parsed(names: list[str]) -> list[ast.Module]:
    paths = [path for name in names for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))]
    return [ast.parse(path.read_text()) for path in paths]


def pattern(message: str) -> re.Pattern[str]:
    """Each VALUE stands for anything, also for what the program leaves open."""
    return re.compile(".*".join(re.escape(part) for part in re.split(f"{VALUE}+", message)), re.DOTALL)


DOCUMENTED = [
    match[2].strip()
    for entry in re.findall(r"^- (.*?)(?=^- |^#|\Z)", SECTION, re.DOTALL | re.MULTILINE)
    # The messages come first, one or several; what follows the last colon explains them.
    for match in re.finditer(r"(?:^|,\s+)(``|`)(.+?)\1(?=[:,])", " ".join(entry.split()))
]
PATTERNS = [pattern(message) for message in DOCUMENTED]
SAID = {text_of(node) for tree in parsed([*EXPLAINED, *ALSO, "nltrain/local/patience.py"]) for node in ast.walk(tree)}
RAISED = sorted(
    {
        text_of(node.exc.args[0])
        for tree in parsed(EXPLAINED)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    }
    - {"", "not reached"}
)


def test_the_page_has_messages():
    assert len(DOCUMENTED) > 60


@pytest.mark.parametrize("message", DOCUMENTED)
def test_a_message_of_the_page_is_one_of_the_code(message):
    assert any(pattern(message).search(said) for said in SAID), message


@pytest.mark.parametrize("message", RAISED)
def test_an_error_of_the_code_is_on_the_page(message):
    assert any(found.search(message) for found in PATTERNS), message
