"""The summary and the plots, from rows of attempts that overlap."""

import json

import pytest

from nltrain.track.report import summarise, write_report
from tests.track.support import run_with_a_kill


def test_the_summary_counts_each_token_once(tmp_path):
    run_with_a_kill(tmp_path)
    summary = write_report(tmp_path)
    assert summary["tokens"] == 1000
    assert summary["tokens_per_s"] == pytest.approx(200.0)
    assert (summary["loss_first"], summary["loss_last"]) == (9.5, 5.0)
    assert (summary["kills"], summary["resumes"], summary["tokens_repeated"]) == (1, 1, 200)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "cadence.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_steps_has_no_summary():
    with pytest.raises(ValueError, match="no step"):
        summarise([])
