"""`nltrain doctor`: asks every node of a Ray cluster for its facts, and lets the devices do one all-reduce together.

Runs on the cluster: `ray job submit --working-dir . -- python -m nltrain.cli doctor --store s3://B/runs`, or on the
head. One actor per node reads the facts; one per GPU (per node where there are none) makes a group, probes its device
and takes part in an all-reduce; health.py judges the facts. No job may hold the GPUs during this minute. The exit code
is 1 where a finding is an error.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from nltrain.network import free_ports
from nltrain.runtime.facts import node_facts, store_facts, transports_in
from nltrain.runtime.health import Finding, GroupFacts, NodeFacts, StoreFacts, all_findings, describe
from nltrain.runtime.launch import ADDRESS_VARIABLE, LaunchError, connect
from nltrain.runtime.probe import DeviceRefusedError, probe, probe_link

START_TIMEOUT_S, ANSWER_TIMEOUT_S, GROUP_TIMEOUT_S = 90.0, 120.0, 60.0
CLOCK_QUESTIONS = 5


class Node:
    """An actor that reads the facts of the node it runs on."""

    def now(self) -> float:
        """This node's clock, Unix seconds."""
        return time.time()

    def facts(self, name: str, num_gpus: int) -> NodeFacts:
        """The facts of this node, except its clock and the store; num_gpus: how many Ray gives out here."""
        return node_facts(name, num_gpus)

    def store(self, url: str, name: str) -> StoreFacts:
        """What this node may do below `url`, and how fast."""
        return store_facts(url, name)


class Member:
    """An actor that is one rank of the group; it has a GPU where the cluster has GPUs."""

    def place(self) -> tuple[str, int]:
        """(address, free port) for the rendezvous of the group, where this is the first rank."""
        return socket.gethostbyname(socket.gethostname()), free_ports(1)[0]

    def probe(self, device: str) -> str:
        """Why the device is refused; empty where it is not."""
        import torch

        try:
            probe(torch.device(device))
        except DeviceRefusedError as error:
            return str(error)
        return ""

    def link(self, device: str, host: str, port: int, rank: int, world_size: int) -> tuple[float, tuple[str, ...]]:
        """(GB/s of an all-reduce, transports of NCCL as it logs them)."""
        import torch
        import torch.distributed as dist

        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl"}
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                init_method=f"tcp://{host}:{port}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=GROUP_TIMEOUT_S),
            )
            try:
                found = probe_link(torch.device(device))
            finally:
                dist.destroy_process_group()
            log = "\n".join(path.read_text(errors="replace") for path in Path(folder).glob("nccl*"))
        return round(found.gb_per_s, 3), transports_in(log)


def examine(ray: Any, url: str) -> list[Finding]:
    """All findings about the cluster that `ray` is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = _names(nodes)
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    readers = {node["NodeID"]: _actor(ray, Node, node["NodeID"], 0) for node in nodes}
    _wait(ray, [reader.now.remote() for reader in readers.values()], "an actor on every node")
    asked = {each: reader.facts.remote(names[each], gpus[each]) for each, reader in readers.items()}
    facts = dict(zip(asked, _wait(ray, list(asked.values()), "the facts of every node"), strict=True))
    for each, reader in readers.items():
        facts[each].skew_s, facts[each].skew_error_s = _skew(ray, reader)
    if url:
        stores = [reader.store.remote(url, names[each]) for each, reader in readers.items()]
        for each, found in zip(readers, _wait(ray, stores, "the store's answers"), strict=True):
            facts[each].store = found
    group = _together(ray, names, gpus)
    return all_findings(list(facts.values()), group, url)


def _together(ray: Any, names: dict[str, str], gpus: dict[str, int]) -> GroupFacts:
    """Probe every device, then one all-reduce over all that are good."""
    device = "cuda" if any(gpus.values()) else "cpu"
    places = [each for each in names for _ in range(gpus[each] if device == "cuda" else 1)]
    group = GroupFacts("nccl" if device == "cuda" else "gloo", len(places), len(set(places)))
    members = [_actor(ray, Member, each, 1 if device == "cuda" else 0) for each in places]
    try:
        started = [member.place.remote() for member in members]
        if len(ray.wait(started, num_returns=len(started), timeout=START_TIMEOUT_S)[0]) < len(started):
            group.error = f"not all of {len(started)} GPUs were free within {START_TIMEOUT_S:g} s"
            return group
        refused = ray.get([member.probe.remote(device) for member in members], timeout=ANSWER_TIMEOUT_S)
        group.refused = {names[each]: why for each, why in zip(places, refused, strict=True) if why}
        if group.refused:
            group.error = "not tried: a device was refused"
            return group
        host, port = ray.get(started[0])
        calls = [member.link.remote(device, host, port, rank, len(members)) for rank, member in enumerate(members)]
        found = ray.get(calls, timeout=ANSWER_TIMEOUT_S)
        group.gb_per_s = min(rate for rate, _ in found)
        group.transports = tuple(sorted({name for _, used in found for name in used}))
    except ray.exceptions.RayError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        group.error = f"{type(error).__name__}: {words[-1] if words else 'no answer'}"[:300]
    finally:
        for member in members:
            ray.kill(member)
    return group


def _actor(ray: Any, cls: type, node_id: str, num_gpus: int) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(cls).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=there).remote()


def _wait(ray: Any, calls: list[Any], what: str) -> list[Any]:
    try:
        return ray.get(calls, timeout=ANSWER_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise LaunchError(f"{what} did not come within {ANSWER_TIMEOUT_S:g} s: look at `ray status`") from None


def _skew(ray: Any, reader: Any) -> tuple[float, float]:
    """(the node's clock minus ours, half of the quickest round trip), seconds."""
    found = []
    for _ in range(CLOCK_QUESTIONS):
        before_s = time.time()
        there_s = ray.get(reader.now.remote())
        after_s = time.time()
        found.append(((after_s - before_s) / 2, there_s - (before_s + after_s) / 2))
    half_s, skew_s = min(found)
    return skew_s, half_s


def _names(nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """{node id: address}, with the beginning of the id where several nodes share an address."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        for node, address in zip(nodes, addresses, strict=True)
    }


def doctor_main(arguments: Sequence[str]) -> int:
    """`nltrain doctor [--store URL] [--json]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nltrain doctor", description="Whether this Ray cluster is fit for a run.")
    parser.add_argument("--store", default="", help="checkpoint.url of the runs to come: its rights and its rate")
    parser.add_argument("--json", action="store_true", help="the findings as one JSON list")
    options = parser.parse_args(arguments)
    address = os.environ.get(ADDRESS_VARIABLE, "auto")
    try:
        if address.startswith("http"):
            raise LaunchError(
                f"{ADDRESS_VARIABLE}={address} is a job server: submit the doctor as a job, "
                "`ray job submit --working-dir . -- python -m nltrain.cli doctor`"
            )
        import ray

        connect(ray, address)
        findings = examine(ray, options.store)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps([each._asdict() for each in findings]) if options.json else describe(findings), flush=True)
    return 1 if any(each.level == "error" for each in findings) else 0
