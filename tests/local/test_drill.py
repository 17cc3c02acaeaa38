"""Code with a planted fault: a statement at the margin of the line that it comes before; a line that is not there."""

from pathlib import Path

import pytest

from nltrain.local.drill import DIE_ON_BAD_NODE, FIRST_OF_A_QUANTUM, DrillError, planted


def test_a_statement_is_planted_before_its_line_of_the_loop(tmp_path: Path) -> None:
    loop = (planted(tmp_path, "if quantum == 6:\n    raise ValueError") / "nltrain" / "loop.py").read_text()
    compile(loop, "loop.py", "exec")
    before, _, after = loop.partition("if quantum == 6:\n")
    margin = before.rpartition("\n")[2]
    assert after.startswith(f"{margin}    raise ValueError\n{margin}{FIRST_OF_A_QUANTUM}\n")


def test_a_line_that_the_loop_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DrillError, match=r"the line 'run\.nothing\(\)' stands there 0 times"):
        planted(tmp_path, DIE_ON_BAD_NODE, "run.nothing()")
