"""The cluster files agree with each other, with pyproject.toml, with the jobs and with what Ray accepts."""

import datetime
import importlib.util
import json
import re
import runpy
import shlex
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from nltrain.runtime.config import STOP_WAIT_S

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY_VERSION = next(
    line.partition("==")[2] for line in PROJECT["dependencies"] if line.startswith("ray[") and "==" in line
)


def read(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_cluster_spec(name):
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def containers(name):
    spec = ray_cluster_spec(name)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield group["template"]["spec"]["containers"][0]


def job_config(name="hope_1p3b"):
    return runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["config"]


KUBERAY = ("kuberay-cluster.yaml", "kuberay-job.yaml")


def test_rays_own_schema_accepts_the_autoscaler_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("aws.yaml")
    validate_config(config)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"


def test_no_ray_command_on_virtual_machines_is_unknown_to_ray():
    from ray.scripts import scripts

    config = read("aws.yaml")
    commands = "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    for start in re.findall(r"ray start [^;\n>&]*", commands):
        # Options are what is checked; nothing is started.
        with scripts.start.make_context("start", shlex.split(start)[2:]):
            pass
    assert commands.count("ray start") == 2


@pytest.mark.parametrize("name", KUBERAY)
def test_the_ray_version_is_the_pinned_one(name):
    assert ray_cluster_spec(name)["rayVersion"] == RAY_VERSION


def test_one_image_of_this_version_everywhere():
    images = {read("aws.yaml")["docker"]["image"]}
    for name in KUBERAY:
        images |= {container["image"] for container in containers(name)}
    images.add(read("kuberay-job.yaml")["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"])
    assert {image.rpartition("/")[2] for image in images} == {f"nltrain:{PROJECT['version']}"}
    assert f"nltrain:{PROJECT['version']}" in (CLUSTER / "Dockerfile").read_text()


def test_the_image_has_a_supported_python_and_all_that_it_copies_exists():
    text = (CLUSTER / "Dockerfile").read_text()
    version = re.search(r"python(3\.\d+) -m venv", text)[1]
    lowest, highest = re.match(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert int(lowest) <= int(version.partition(".")[2]) < int(highest)
    for line in re.findall(r"^COPY --chown=nltrain (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_torch_comes_from_the_index_of_one_cuda_in_the_version_of_the_project():
    text = (CLUSTER / "Dockerfile").read_text()
    index = re.search(r"^ARG TORCH_INDEX=https://download\.pytorch\.org/whl/cu(\d+)$", text, re.MULTILINE)
    assert index
    [wanted] = [line for line in PROJECT["dependencies"] if line.startswith("torch==")]
    install = text.index(f'pip install --no-cache-dir --index-url "$TORCH_INDEX" {wanted}')
    # torch is there before the rest asks for it: pip would take it from PyPI.
    assert install < text.index("pip install --no-cache-dir .")


def test_a_stopped_job_gets_time_to_save_everywhere():
    wanted = f"RAY_JOB_STOP_WAIT_TIME_S={STOP_WAIT_S}"
    assert wanted in (CLUSTER / "Dockerfile").read_text()
    config = read("aws.yaml")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any(wanted in command for command in commands)
    for name in KUBERAY:
        for container in containers(name):
            assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_WAIT_S)} in container["env"]


def test_token_authentication_is_on_everywhere():
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    config = read("aws.yaml")
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    for name in KUBERAY:
        assert ray_cluster_spec(name)["authOptions"] == {"mode": "token"}


def test_dashboards_listen_on_loopback_unless_the_operator_has_to_reach_them():
    assert any("--dashboard-host=127.0.0.1" in command for command in read("aws.yaml")["head_start_ray_commands"])
    spec = ray_cluster_spec("kuberay-cluster.yaml")
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    job = ray_cluster_spec("kuberay-job.yaml")
    assert job["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert job["authOptions"]["mode"] == "token"


def test_no_secret_stands_in_a_file():
    for path in CLUSTER.iterdir():
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|AWS_SECRET_ACCESS_KEY\s*[:=]\s*\S|WANDB_API_KEY\s*[:=]\s*\S", text)


@pytest.mark.parametrize("name", KUBERAY)
def test_workers_hold_the_ranks_of_the_large_job(name):
    config, spec = job_config(), ray_cluster_spec(name)
    [group] = spec["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    gpus = int(resources["limits"]["nvidia.com/gpu"])
    assert resources["requests"] == resources["limits"]
    assert gpus * group["maxReplicas"] == config.cluster.max_workers
    assert gpus * group["minReplicas"] == config.cluster.min_workers
    assert gpus * config.cluster.cpus_per_worker <= int(resources["limits"]["cpu"])
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_virtual_machines_hold_the_ranks_of_the_large_job():
    config, gpu = job_config(), read("aws.yaml")["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] * gpu["max_workers"] == config.cluster.max_workers
    assert gpu["resources"]["GPU"] * config.cluster.cpus_per_worker <= gpu["resources"]["CPU"]
    assert read("aws.yaml")["max_workers"] == gpu["max_workers"]


@pytest.mark.parametrize("name", KUBERAY)
def test_a_leaving_pod_drains_within_its_grace(name):
    from ray.scripts import scripts

    *_, worker = containers(name)
    shell = worker["lifecycle"]["preStop"]["exec"]["command"][-1]
    drain, _, sleep = shell.partition(";")
    with scripts.drain_node.make_context("drain-node", shlex.split(drain)[2:]) as context:
        seconds = context.params["deadline_remaining_seconds"]
        assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    grace = ray_cluster_spec(name)["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds == int(sleep.split()[1]) < grace


@pytest.mark.parametrize("name", KUBERAY)
def test_a_worker_joins_under_the_name_of_its_machine(name):
    """Strikes are kept by that name: a pod that comes back gets another address, not another machine."""
    from ray.scripts import scripts

    [group] = ray_cluster_spec(name)["workerGroupSpecs"]
    *_, worker = containers(name)
    assert group["rayStartParams"]["node-name"] == "$NODE_NAME"
    assert {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}} in worker["env"]
    assert "--node-name" in [option for parameter in scripts.start.params for option in parameter.opts]


def test_the_ports_are_rays():
    for name in KUBERAY:
        head = next(containers(name))
        assert {port["name"]: port["containerPort"] for port in head["ports"]} == {
            "gcs-server": 6379,
            "dashboard": 8265,
        }
    commands = read("aws.yaml")["head_start_ray_commands"]
    assert any("--port=6379" in command and "--dashboard-port=8265" in command for command in commands)


def test_the_job_of_the_manifest_is_one_that_exists_and_takes_its_overrides():
    from nltrain.config import override

    words = shlex.split(read("kuberay-job.yaml")["spec"]["entrypoint"])
    assert words[0] == "python"
    path = ROOT / Path(words[1]).relative_to("/opt/nltrain")
    config = override(runpy.run_path(str(path))["config"], words[2:])
    assert config.checkpoint.url.startswith("s3://")
    assert config.output.startswith("/mnt/nltrain/")
    mounts = list(containers("kuberay-job.yaml"))[-1]["volumeMounts"]
    assert any(mount["mountPath"] == "/mnt/nltrain" for mount in mounts)


@pytest.fixture
def metadata_service():
    """An instance metadata service: `going` is the time of the interruption, or None."""

    class Handler(BaseHTTPRequestHandler):
        going = None

        def do_PUT(self):
            self.answer(200, b"the-token")

        def do_GET(self):
            assert self.headers["X-aws-ec2-metadata-token"] == "the-token"
            if Handler.going is None:
                self.answer(404, b"")
            else:
                self.answer(200, json.dumps({"action": "terminate", "time": Handler.going}).encode())

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def watch_preemption():
    spec = importlib.util.spec_from_file_location("watch_preemption", CLUSTER / "watch_preemption.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_spot_notice_is_read_and_becomes_a_drain_that_ray_accepts(metadata_service, watch_preemption):
    from ray.scripts import scripts

    url, handler = metadata_service
    assert watch_preemption.notice(url) is None
    handler.going = "2027-01-02T03:04:05Z"
    assert watch_preemption.notice(url) == datetime.datetime(2027, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    command = watch_preemption.drain_command("10.0.0.1:6379", 109.6)
    with scripts.drain_node.make_context("drain-node", command[2:]) as context:
        assert context.params["deadline_remaining_seconds"] == 109
        assert context.params["address"] == "10.0.0.1:6379"
