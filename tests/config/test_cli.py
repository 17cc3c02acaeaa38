"""The command line refuses in one line what it cannot do, and says what there is."""

from pathlib import Path

import pytest

from nltrain.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main([]) == 2


def test_an_unknown_command_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lst"]) == 2
    assert capsys.readouterr().err == f"error: nltrain lst: no such command; there are {', '.join(COMMANDS)}\n"


def test_sizes_prints_a_line_for_each_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sizes", str(ROOT / "jobs" / "hope_tiny.py"), "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize(
    ("job", "says"),
    [("none.py", "none.py: No such file or directory; name a file such as"), ("paper.py", "defines no")],
)
def test_a_file_that_is_no_job_is_refused(job: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sizes", str(ROOT / "jobs" / job)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
