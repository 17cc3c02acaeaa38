"""`make demo DEMO=--quick` where everything is odd at once: it ends well and follows nothing of the user's."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.demo_environments import one_file
from nltrain.local.hostile import STRANGER, can_be_a_stranger, hostile, without_home
from nltrain.track.metrics import read_rows

ROOT = Path(__file__).resolve().parents[2]
# A model for which the way of a token takes longer than the arithmetic.
SMALL = (
    "model.width=32", "model.num_layers=1", "model.head_dim=16", "model.memory_hidden=16", "model.vocab_size=512",
)  # fmt: skip


def test_the_quick_demo_ends_well_on_one_file_under_everything_at_once(tmp_path):
    """Proxies, a foreign profile and endpoint, no home, no name, C locale, a comma in the path, one document."""
    output, prefix = tmp_path / "runs" / "de, mo", STRANGER if can_be_a_stranger() else ()
    with hostile(tmp_path / "home") as (_, variables):
        done = subprocess.run(
            [*prefix, sys.executable, "jobs/demo.py", "--quick", "--output", str(output),
             "--corpus", str(one_file(tmp_path / "a,b")), *SMALL],
            cwd=ROOT, env=without_home(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="ascii", timeout=900,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["finished"] and summary["kills"] == summary["resumes"] == 1
    assert summary["val_loss"] is None and "the run goes on without validation" in done.stdout
    assert all(count["done"] == count["due"] > 0 for count in summary["level_updates"].values())
    assert [row["reason"] for row in read_rows(output) if row["kind"] == "end"] == ["finished"]
    assert not (output / "tmp").exists()
