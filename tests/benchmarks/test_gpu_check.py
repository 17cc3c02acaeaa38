"""The check of a GPU, on a CPU: a part that fails does not hide the others, and the job's part runs the real loop."""

import json
from pathlib import Path

import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_check import Part, check, parts_of, read_json, run, table
from benchmarks.gpu_job import NEEDED, Runs, check_resume, check_stages, describe, prepare
from benchmarks.gpu_model import Clock


def test_a_part_that_fails_hangs_or_is_skipped_does_not_hide_the_others() -> None:
    parts = [
        Part("fails", ("-c", "print('why'); raise SystemExit(3)"), 20, False),
        Part("hangs", ("-c", "import time; time.sleep(60)"), 0.3, False),
        Part("skipped", (), 1, False, "by choice"),
        Part("ok", ("-c", "print('done')"), 20, False),
    ]
    found = check(parts, "cpu")
    assert [result["status"] for result in found.values()] == ["failed", "failed", "skipped", "ok"]
    assert found["fails"]["reason"] == "exit code 3" and found["fails"]["log_ends_with"] == "why\n"
    assert found["hangs"]["reason"].startswith("not done within")
    assert [line.split()[1] for line in table(found).splitlines()[1:]] == ["failed", "failed", "skipped", "ok"]
    json.dumps(found)


def test_the_file_that_a_part_writes_is_its_result(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[sys.argv.index('--out') + 1], 'w').write('{}'); raise SystemExit(2)"
    found = run(Part("model", ("-c", code), 20), "cpu", tmp_path)
    assert found["result"] == {} and found["reason"] == "no device"
    assert read_json('{"rows": [') is None and read_json("") is None and read_json("[1]") == [1]


def test_every_part_can_be_left_out() -> None:
    names = [part.name for part in parts_of("cuda", False, ())]
    assert names == ["tests", "kernels", "model", "job"]
    assert all(part.skipped for part in parts_of("cuda", False, tuple(names)))
    for minutes in (8, 30):
        assert abs(sum(part.limit_s for part in parts_of("cuda", False, (), minutes)) - minutes * 60) < 1


def test_the_memories_alone_are_timed_and_compared_with_float64() -> None:
    row = gpu_kernels.Row("chunk", 16, 16, 1, 40, 2)
    gpu_kernels.time_row(row, Clock(torch.device("cpu"), 0.0), 1e12)
    assert row.forward_ms and row.both_ms and row.both_ms > row.forward_ms
    assert row.forward_share and "of the product" in gpu_kernels.describe(row)
    found = gpu_kernels.errors_of("chunk", 8, 8, 17)
    assert all(0 < found[group] <= bound for group, bound in gpu_kernels.ERROR_BOUNDS.items())


def test_the_real_loop_is_killed_and_resumed_and_trains_at_every_zero_stage(tmp_path: Path) -> None:
    assert "ray" not in NEEDED
    runs = Runs(tmp_path, "cpu", quick=True)
    prepare(tmp_path, int(runs.values["data.seq_len"]))
    resumed = check_resume(runs)
    assert resumed["quanta"] == 12 and resumed["resumed_at_tokens"] > 0
    stages = check_stages(runs)
    assert set(stages["loss_last"]) == {"zero1", "zero2", "zero3"}
    assert describe("resume", {"ok": True, "seconds": 1.0} | resumed).startswith("job, resume   ok in 1.0 s: quanta 12")
