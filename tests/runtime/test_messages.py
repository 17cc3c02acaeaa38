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
    *(f"nltrain/{room}/config.py" for room in ("checkpoint", "data", "levels", "model", "track")),
    *(f"nltrain/runtime/{name}.py" for name in ("config", "launch", "preflight", "status")),
    *(f"nltrain/local/{name}.py" for name in ("cluster", "demo", "environment", "own_ray")),
    "nltrain/config.py", "nltrain/track/record.py", "nltrain/resume.py", "nltrain/run.py",
    "nltrain/levels/optimizers.py", "nltrain/model/choices.py",
]  # fmt: skip
ALSO = [
    *(f"nltrain/{room}" for room in ("checkpoint", "track", "data", "store", "local")),
    "kernels/dispatch.py", "kernels/compiler.py",
]  # fmt: skip


def text_of(node: ast.AST) -> str:
    """A string of the program with VALUE for what it fills in; empty where it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ""


def required(node: ast.AST) -> str:
    """The message of a `require(condition, field, value, remedy)`, of a `need(condition, name, remedy)`, which gives
    `require` the field that `name` is, or of a `yield field, remedy` that `need` gets; empty for anything else."""
    if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
        field, remedy = (text_of(part) or VALUE for part in node.value.elts)
        return f"{VALUE}.{field}={VALUE}: {remedy}"
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return ""
    if node.func.id not in ("require", "need"):
        return ""
    field, remedy = text_of(node.args[1]) or VALUE, text_of(node.args[-1]) or VALUE
    return f"{'' if node.func.id == 'require' else VALUE + '.'}{field}={VALUE}: {remedy}"


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
SAID = {
    said
    for tree in parsed([*EXPLAINED, *ALSO, "nltrain/local/patience.py"])
    for node in ast.walk(tree)
    for said in (text_of(node), required(node))
}
RAISED = sorted(
    {
        text_of(node.exc.args[0])
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        else required(node)
        for tree in parsed(EXPLAINED)
        for node in ast.walk(tree)
    }
    # What `need` does with its arguments, and with what an optimizer says of a level's settings.
    - {"", "not reached", *(f"{room}.{VALUE}={VALUE}: {VALUE}" for room in ("levels", "levels.schedule", "model"))}
    - {f"levels.levels.{VALUE}.{VALUE}={VALUE}: {VALUE}", f"{VALUE}.{VALUE}={VALUE}: {VALUE}"}
    - {f"{VALUE}.offload={VALUE}: {VALUE}"}  # the remedy is a name there; it is documented as it is written
)


def test_the_page_has_messages() -> None:
    assert len(DOCUMENTED) > 60


@pytest.mark.parametrize("message", DOCUMENTED)
def test_a_message_of_the_page_is_one_of_the_code(message: str) -> None:
    assert any(pattern(message).search(said) for said in SAID), message


@pytest.mark.parametrize("message", RAISED)
def test_an_error_of_the_code_is_on_the_page(message: str) -> None:
    assert any(found.search(message) for found in PATTERNS), message
