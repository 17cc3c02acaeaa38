"""`nltrain doctor` on the cluster of this room, by the command a user types."""

import json
import subprocess
import sys

from nltrain.local.drill import BUCKET, ROOT


def doctor(drill, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nltrain.cli", "doctor", *arguments],
        cwd=ROOT,
        env=drill.cluster.environment | {"RAY_ADDRESS": f"127.0.0.1:{drill.cluster.port}"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_doctor_looks_at_every_node_and_says_what_it_cannot_see(drill):
    done = doctor(drill, "--store", f"s3://{BUCKET}/runs", "--json")
    assert done.stdout, done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout.splitlines()[-1])}
    levels = {check: each["level"] for check, each in found.items()}
    for check in ("driver", "devices", "fabric", "transport"):
        assert levels[check] == "not applicable"
    for check in ("versions", "clocks", "link"):
        assert levels[check] == "ok", found[check]
    # How fast an S3 server on busy cores is says nothing about the doctor: slow is a warning.
    assert levels["store"] in ("ok", "warning"), found["store"]
    assert "put, get, list, delete" in found["store"]["text"]
    alive = 1 + sum(node.alive for node in drill.nodes)
    assert f"on all {alive} nodes" in found["versions"]["text"]
    assert f"all-reduce over {alive} ranks on {alive} nodes" in found["link"]["text"]
    assert done.returncode == (1 if "error" in levels.values() else 0)


def test_a_bucket_that_is_not_there_is_an_error_with_a_remedy(drill):
    done = doctor(drill, "--store", "s3://no-such-bucket/runs")
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if " store " in line]
    assert line.startswith("error")
    assert "the bucket does not exist" in line
    assert "-> the nodes' role needs s3:ListBucket" in line


def test_a_job_server_is_refused_with_the_way_in(drill):
    done = doctor(drill, RAY_ADDRESS=drill.cluster.job_address)
    assert done.returncode == 1
    assert "submit the doctor as a job" in done.stderr
