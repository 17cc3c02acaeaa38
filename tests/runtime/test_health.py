"""Every check of `nltrain doctor` passes on sound facts and fails once on each fault, with its remedy."""

from dataclasses import replace

import pytest

from nltrain.runtime.health import GroupFacts, NodeFacts, StoreFacts, all_findings, describe

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
