"""W&B as a view: the numbers it gets, and that its failure costs nothing but itself."""

from nltrain.track.config import TrackConfig
from nltrain.track.wandb_view import NoView, SafeView, numbers, open_view
from tests.track.support import row


def test_numbers_are_named_by_kind_and_level():
    found = numbers(row("tick", 5, level="slow", lr=0.5, skipped="", time_s=7.0))
    assert found["level/slow/lr"] == 0.5 and found["level/slow/time_s"] == 7.0
    assert not {"level/slow/tokens", "level/slow/attempt", "level/slow/version", "level/slow/skipped"} & set(found)
    assert numbers(row("step", 5, loss=2.0))["step/loss"] == 2.0
    assert "step/loss" not in numbers(row("step", 5, loss=None))


def test_a_view_that_fails_is_given_up_with_one_line(capsys):
    class Failing(NoView):
        def log(self, row):
            raise OSError("cut")

    view = SafeView(Failing)
    view.log(row("step", 5))
    view.log(row("step", 6))
    view.close()
    assert capsys.readouterr().err == "W&B could not log (cut): the run goes on, its metrics are in the JSONL\n"


def test_only_rank_0_has_a_view(tmp_path):
    for rank, wandb in ((1, "offline"), (0, "off")):
        open_view(TrackConfig(wandb=wandb), rank, "r", "r", str(tmp_path), {}).log(row("step", 5))
    assert list(tmp_path.iterdir()) == []
