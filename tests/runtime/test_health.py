"""Every check of `nltrain doctor` passes on sound facts and fails once on each fault, with its remedy.

The device probe with each of its parts returning one wrong value; the readers on what they are for.
"""

import http.server
import threading
from dataclasses import replace

import pytest
import torch

from nltrain.runtime import facts, health
from nltrain.runtime.health import GroupFacts, NodeFacts, StoreFacts, all_findings, describe
from nltrain.runtime.probe import DeviceRefusedError, driver_problem, probe, probe_compute, probe_link, probe_memory
from nltrain.store import LocalStore, StoreError

CPU = torch.device("cpu")
RATE = StoreFacts(put_bytes_per_s=200e6, get_bytes_per_s=300e6)


def node(name, **values):
    sound = NodeFacts(
        name,
        python="3.12.3",
        packages={"torch": "2.13.0+cu130", "ray": "2.60.0"},
        skew_error_s=0.01,
        shm_bytes=64 << 30,
        open_files=65536,
        locked_memory_bytes=-1,
        num_gpus=8,
        driver="580.65.06",
        torch_cuda="13.0",
        fabric_cards=32,
        fabric_devices=32,
        wandb_key=True,
        store=RATE,
    )
    return replace(sound, **values)


GROUP = GroupFacts("nccl", world_size=16, num_nodes=2, gb_per_s=180.0, transports=("NET/OFI", "P2P/CUMEM"))


def levels(nodes, group=GROUP):
    return {each.check: each.level for each in all_findings(nodes, group, "s3://b/runs")}


def test_a_sound_cluster_has_no_finding_but_ok():
    assert set(levels([node("a"), node("b")]).values()) == {"ok"}


@pytest.mark.parametrize(
    ("check", "level", "changed", "words"),
    [
        ("versions", "error", {"packages": {"torch": "2.11.0", "ray": "2.60.0"}}, "b: torch 2.11.0 instead of 2.13.0"),
        ("versions", "error", {"python": "3.11.9"}, "b: Python 3.11.9 instead of 3.12.3"),
        ("driver", "error", {"driver": "535.183.01"}, "driver 535.183.01 is too old for torch's CUDA 13.0"),
        ("driver", "error", {"driver": ""}, "no NVIDIA driver"),
        ("driver", "error", {"torch_cuda": None}, "torch is built for CPUs"),
        ("driver", "warning", {"driver": "590.10"}, "drivers differ: 580.65.06 on 2, 590.10 on 1"),
        ("clocks", "warning", {"skew_s": 5.0}, "b is +5.00 s off"),
        ("clocks", "error", {"skew_s": -900.0}, "b is -900.00 s off"),
        ("shm", "error", {"shm_bytes": 64 << 20}, "b: 0.06 GiB"),
        ("limits", "error", {"open_files": 1024}, "b: 1024 open files"),
        ("limits", "warning", {"open_files": 20000}, "b: 20000 open files"),
        ("limits", "error", {"locked_memory_bytes": 8192}, "b: 8192 bytes of locked memory"),
        ("fabric", "error", {"fabric_devices": 0}, "b: 0 of 32 cards"),
        ("store", "error", {"store": StoreFacts({"put": "access refused"})}, "b: put: access refused"),
        ("store", "warning", {"store": StoreFacts({}, 1e6, 300e6)}, "slowest b 1 MB/s"),
        ("wandb", "warning", {"wandb_error": "timed out"}, "b: timed out"),
        ("wandb", "warning", {"wandb_key": False}, "no WANDB_API_KEY on b"),
    ],
)
def test_a_fault_of_one_node_is_found_by_its_check_alone(check, level, changed, words):
    nodes = [node("a"), node("b", **changed), node("c")]
    found = {each.check: each for each in all_findings(nodes, GROUP, "s3://b/runs")}
    assert found[check].level == level
    assert words in found[check].text
    assert found[check].remedy
    assert [each for each, finding in found.items() if finding.level != "ok"] == [check]


@pytest.mark.parametrize(
    ("checks", "level", "changed", "words"),
    [
        (["transport"], "error", {"transports": ("NET/Socket",)}, "NCCL uses NET/Socket although there is a fabric"),
        (["link"], "warning", {"gb_per_s": 3.0}, "3.00 GB/s a rank, below 20"),
        (["devices", "transport", "link"], "error", {"error": "timed out"}, "timed out"),
        (["devices"], "error", {"refused": {"b": "wrong sum"}}, "b: wrong sum"),
    ],
)
def test_a_fault_of_the_group_is_found(checks, level, changed, words):
    found = {each.check: each for each in all_findings([node("a"), node("b")], replace(GROUP, **changed), "s3://b/r")}
    assert [each for each, finding in found.items() if finding.level != "ok"] == checks
    assert {found[check].level for check in checks} == {level}
    assert words in found[checks[0]].text


def test_sockets_without_a_fabric_are_slow_not_wrong():
    nodes = [node("a", fabric_cards=0, fabric_devices=0)]
    assert levels(nodes, replace(GROUP, transports=("NET/Socket",)))["transport"] == "warning"


def test_a_machine_without_gpus_does_not_pretend():
    nodes = [node("a", num_gpus=0, driver="", torch_cuda=None, fabric_cards=0, fabric_devices=0, store=None)]
    found = levels(nodes, GroupFacts("gloo", 1, 1))
    silent = {check for check, level in found.items() if level == "not applicable"}
    assert silent == {"driver", "devices", "fabric", "transport", "link", "store"}


def test_the_lines_end_with_the_remedy_and_the_count():
    text = describe(all_findings([node("a"), node("b", shm_bytes=0)], GROUP, "s3://b/runs"))
    assert "error          shm        /dev/shm too small: b: 0.00 GiB -> start the container with" in text
    assert text.endswith("10 ok, 0 warning, 1 error")


@pytest.mark.parametrize(
    ("driver", "cuda", "sound"),
    [("580.65.06", "13.0", True), ("570.1", "13.0", False), ("535.1", "12.6", True), ("470.1", "12.6", False)],
)
def test_a_driver_runs_the_cuda_of_its_age(driver, cuda, sound):
    assert (driver_problem(driver, cuda) == "") is sound


def test_a_driver_that_is_too_old_is_told_which_wheel_it_could_run():
    assert driver_problem("535.1", "13.0").endswith("or build the image with a TORCH_INDEX of cu12x")


def test_a_sound_device_passes():
    assert "memory right" in probe(CPU)


def test_one_wrong_element_of_a_product_refuses_the_device():
    def faulty(a, b):
        product = a @ b
        product[3, 5] += 1
        return product

    with pytest.raises(DeviceRefusedError, match=r"cpu: 1 elements of a 128 x 128 matmul in torch.float32 are wrong"):
        probe_compute(CPU, faulty)


def test_a_product_is_exact_in_whatever_order_it_is_summed():
    """A kernel may cut the sum into parts and add those up in bf16."""

    def in_parts(a, b):
        half = a.shape[1] // 2
        return a[:, :half] @ b[:half] + a[:, half:] @ b[half:]

    probe_compute(CPU, in_parts)


def test_one_bit_that_memory_does_not_keep_refuses_the_device():
    def faulty(held):
        held[7] ^= 1
        return held

    with pytest.raises(DeviceRefusedError, match="1 words of 8 bytes in its memory do not keep a pattern"):
        probe_memory(CPU, faulty)


def test_a_wrong_sum_over_the_link_refuses_the_device(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert probe_link(CPU).seconds > 0
        with pytest.raises(DeviceRefusedError, match="elements of an all-reduce over 1 ranks are wrong"):
            probe_link(CPU, lambda values: values.add_(1))
    finally:
        torch.distributed.destroy_process_group()


def test_a_store_that_refuses_is_told_by_verb(tmp_path, monkeypatch):
    found = facts.store_facts(str(tmp_path), "a/b", num_bytes=1000)
    assert not found.errors
    assert found.put_bytes_per_s > 0
    assert not list(tmp_path.rglob("*.bin"))
    for verb in ("put", "get", "list", "delete"):
        with monkeypatch.context() as patch:

            def refuse(*_):
                raise StoreError("access refused")

            patch.setattr(LocalStore, verb, refuse)
            assert facts.store_facts(str(tmp_path), "a", num_bytes=1000).errors == {verb: "access refused"}
    monkeypatch.setattr(LocalStore, "get", lambda *_: b"other")
    assert "not what was put" in facts.store_facts(str(tmp_path), "a", num_bytes=1000).errors["get"]


def test_transports_are_read_from_the_log_of_nccl():
    log = """
h:1:9 [0] NCCL INFO Using network AWS Libfabric
h:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
h:1:9 [0] NCCL INFO Channel 01/0 : 8[0] -> 0[0] [receive] via NET/OFI/0/GDRDMA
h:1:9 [0] NCCL INFO Channel 02/0 : 8[0] -> 0[0] [send] via NET/OFI/3/GDRDMA
"""
    assert facts.transports_in(log) == ("NET/OFI", "P2P/CUMEM")
    assert facts.transports_in(log.replace("NET/OFI", "NET/Socket")) == ("NET/Socket", "P2P/CUMEM")


def test_a_server_that_answers_anything_is_reached_and_one_that_does_not_is_named():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    assert facts.wandb_error(f"http://{address}") == ""
    server.shutdown()
    server.server_close()
    thread.join()
    assert facts.wandb_error(f"http://{address}").startswith(address)


def test_shared_memory_that_is_not_there_is_none(tmp_path):
    assert facts.shm_bytes(str(tmp_path / "none")) == 0
    assert facts.shm_bytes(str(tmp_path)) > 0


def test_this_machine_describes_itself():
    found = facts.node_facts("here", 0)
    assert found.packages["ray"]
    assert found.driver == ""
    assert health.check_versions([found]).level == "ok"
