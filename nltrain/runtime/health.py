"""Whether a cluster is fit for a run: each check is a function of the facts that its nodes reported. No Ray.

`nltrain doctor` collects the facts (facts.py) and prints the findings. A check that does not apply to a machine is
"not applicable" instead of passed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from nltrain.runtime.probe import driver_problem

Level = Literal["ok", "warning", "error", "not applicable"]

WARN_SKEW_S, MAX_SKEW_S = 2.0, 60.0
MIN_SHM_BYTES = 1 << 30  # docker's default of 64 MiB breaks NCCL; its rings and Ray's store need more
MIN_OPEN_FILES, GOOD_OPEN_FILES = 4096, 65536
SLOW_STORE_BYTES_PER_S = 20e6
# All-reduce between nodes, GB/s: a tenth of what eight H100 with EFA or InfiniBand reach.
SLOW_FABRIC_GB_PER_S, SLOW_NODE_GB_PER_S = 20.0, 50.0
NAMED = 4  # nodes named in one line


class Finding(NamedTuple):
    """One line of the doctor."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass
class StoreFacts:
    """What one node may do with the store. `errors`: {verb: why it failed}."""

    errors: dict[str, str] = field(default_factory=dict)
    put_bytes_per_s: float = 0.0
    get_bytes_per_s: float = 0.0


@dataclass
class NodeFacts:
    """What one node says of itself."""

    name: str
    python: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    skew_s: float = 0.0
    """its clock minus that of the node that asks"""
    skew_error_s: float = 0.0
    """half of the time that the question took"""
    shm_bytes: int = 0
    open_files: int = 0
    """soft limit; -1: none"""
    locked_memory_bytes: int = 0
    """limit; -1: none"""
    num_gpus: int = 0
    """that Ray gives out"""
    driver: str = ""
    torch_cuda: str | None = None
    fabric_cards: int = 0
    """EFA or InfiniBand cards of the machine"""
    fabric_devices: int = 0
    """of them usable from here (/dev/infiniband/uverbs*)"""
    wandb_key: bool = False
    wandb_error: str = ""
    """why W&B's server cannot be reached; empty: it can"""
    store: StoreFacts | None = None


@dataclass
class GroupFacts:
    """What the ranks found out together: one per GPU, or one per node where there are none."""

    backend: str
    world_size: int = 0
    num_nodes: int = 0
    gb_per_s: float = 0.0
    transports: tuple[str, ...] = ()
    """of NCCL: "NET/OFI", "P2P", ..."""
    refused: dict[str, str] = field(default_factory=dict)
    """{node: what its device did wrong}"""
    error: str = ""
    """why the group did not come about"""


def check_versions(nodes: Sequence[NodeFacts]) -> Finding:
    """Python and the packages have one version on all nodes; the version of most nodes counts as right."""
    each = {node.name: {"Python": node.python, **node.packages} for node in nodes}
    usual = dict(Counter(tuple(sorted(versions.items())) for versions in each.values()).most_common(1)[0][0])
    wrong = []
    for name, versions in each.items():
        differs = [
            f"{package} {versions.get(package, 'missing')} instead of {usual.get(package, 'none')}"
            for package in sorted(versions.keys() | usual.keys())
            if versions.get(package) != usual.get(package)
        ]
        if differs:
            wrong.append(f"{name}: {', '.join(differs)}")
    if wrong:
        return Finding("versions", "error", _some(wrong), "run the same image on every node")
    named = ", ".join(f"{name} {usual[name]}" for name in ("Python", "torch", "deepspeed", "ray") if name in usual)
    return Finding("versions", "ok", f"{named} on {_all(nodes)}")


def check_driver(nodes: Sequence[NodeFacts]) -> Finding:
    """Each node's NVIDIA driver runs the CUDA of its torch; different drivers are a warning."""
    gpu = [node for node in nodes if node.num_gpus]
    if not gpu:
        return Finding("driver", "not applicable", "no node gives out GPUs")
    wrong = [f"{node.name}: {problem}" for node in gpu if (problem := driver_problem(node.driver, node.torch_cuda))]
    if wrong:
        return Finding("driver", "error", _some(wrong), "see docs/cluster.md, On AWS, step 4")
    drivers = Counter(node.driver for node in gpu)
    if len(drivers) > 1:
        text = ", ".join(f"{driver} on {count}" for driver, count in drivers.most_common())
        return Finding("driver", "warning", f"drivers differ: {text}", "use one AMI or node image")
    return Finding("driver", "ok", f"{gpu[0].driver} runs torch's CUDA {gpu[0].torch_cuda} on {_all(gpu)}")


def check_clocks(nodes: Sequence[NodeFacts]) -> Finding:
    """No clock differs from the asking one by more than WARN_SKEW_S, beyond what the measurement can be wrong."""
    worst = max(nodes, key=lambda node: abs(node.skew_s) - node.skew_error_s)
    beyond = max(0.0, abs(worst.skew_s) - worst.skew_error_s)
    text = f"{worst.name} is {worst.skew_s:+.2f} s off (measured to {worst.skew_error_s:.2f} s)"
    remedy = "run chrony on it (AWS: 169.254.169.123); S3 refuses clocks that are 15 minutes off"
    if beyond > MAX_SKEW_S:
        return Finding("clocks", "error", text, remedy)
    if beyond > WARN_SKEW_S:
        return Finding("clocks", "warning", text, remedy)
    return Finding("clocks", "ok", f"largest difference {abs(worst.skew_s):.2f} s on {_all(nodes)}")


def check_shm(nodes: Sequence[NodeFacts]) -> Finding:
    """/dev/shm holds at least MIN_SHM_BYTES on each node."""
    wrong = [f"{node.name}: {_gib(node.shm_bytes)}" for node in nodes if node.shm_bytes < MIN_SHM_BYTES]
    if wrong:
        return Finding(
            "shm",
            "error",
            f"/dev/shm too small: {_some(wrong)}",
            "start the container with --shm-size=64g or --ipc=host",
        )
    return Finding("shm", "ok", f"at least {_gib(min(node.shm_bytes for node in nodes))} on {_all(nodes)}")


def check_limits(nodes: Sequence[NodeFacts]) -> Finding:
    """Limits of open files, and of locked memory where a node has a fabric, which pins its buffers."""
    remedy = "ulimit -n 65536 before `ray start`, docker run --ulimit nofile=65536:65536 --ulimit memlock=-1:-1"
    pinned = [
        f"{node.name}: {node.locked_memory_bytes} bytes of locked memory"
        for node in nodes
        if node.fabric_cards and node.locked_memory_bytes >= 0
    ]
    few = [f"{node.name}: {node.open_files} open files" for node in nodes if 0 <= node.open_files < MIN_OPEN_FILES]
    if pinned or few:
        return Finding("limits", "error", _some(pinned + few), remedy)
    low = [f"{node.name}: {node.open_files} open files" for node in nodes if 0 <= node.open_files < GOOD_OPEN_FILES]
    if low:
        return Finding("limits", "warning", _some(low), remedy)
    return Finding("limits", "ok", f"open files and locked memory on {_all(nodes)}")


def check_fabric(nodes: Sequence[NodeFacts]) -> Finding:
    """Every EFA or InfiniBand card of a node can be used by the run's processes."""
    cards = [node for node in nodes if node.fabric_cards]
    if not cards:
        return Finding("fabric", "not applicable", "no node has an EFA or InfiniBand card")
    wrong = [
        f"{node.name}: {node.fabric_devices} of {node.fabric_cards} cards"
        for node in cards
        if node.fabric_devices < node.fabric_cards
    ]
    if wrong:
        return Finding(
            "fabric",
            "error",
            f"cards that cannot be used from here: {_some(wrong)}",
            "docker run --device /dev/infiniband; Kubernetes: request vpc.amazonaws.com/efa",
        )
    return Finding("fabric", "ok", f"{cards[0].fabric_cards} cards on {_all(cards)}")


def check_devices(nodes: Sequence[NodeFacts], group: GroupFacts) -> Finding:
    """Every device gave right answers when it was probed (probe.py)."""
    if group.refused:
        wrong = [f"{name}: {why}" for name, why in group.refused.items()]
        return Finding("devices", "error", _some(wrong), "take the node out of service (ray drain-node) and replace it")
    if not any(node.num_gpus for node in nodes):
        return Finding("devices", "not applicable", "no node gives out GPUs")
    if group.error:
        return Finding("devices", "error", group.error, "end the jobs that hold the GPUs, then run the doctor again")
    return Finding("devices", "ok", f"matmul and memory right on {group.world_size} GPUs")


def check_transport(nodes: Sequence[NodeFacts], group: GroupFacts) -> Finding:
    """NCCL uses the fabric between nodes where they have one, not TCP sockets."""
    if group.backend != "nccl":
        return Finding("transport", "not applicable", "NCCL needs GPUs")
    if group.error:
        return Finding("transport", "error", group.error, "look at the log of the rank that is named; NCCL_DEBUG=INFO")
    used = ", ".join(group.transports) or "none: one rank"
    if group.num_nodes > 1 and any(name.startswith("NET/Socket") for name in group.transports):
        if any(node.fabric_cards for node in nodes):
            return Finding(
                "transport",
                "error",
                f"NCCL uses {used} although there is a fabric",
                "build the image with EFA_INSTALLER, FI_PROVIDER=efa, docker run --device /dev/infiniband",
            )
        return Finding("transport", "warning", f"NCCL uses {used}", "TCP is slow: use instances with EFA or InfiniBand")
    return Finding("transport", "ok", f"NCCL uses {used}")


def check_link(group: GroupFacts) -> Finding:
    """An all-reduce over all ranks works, and over NCCL is fast enough."""
    if group.error:
        return Finding("link", "error", group.error, "let all nodes reach each other on all ports (security group)")
    if group.world_size < 2:
        return Finding("link", "not applicable", "one rank sends nothing")
    text = f"all-reduce over {group.world_size} ranks on {group.num_nodes} nodes: {group.gb_per_s:.2f} GB/s a rank"
    if group.backend != "nccl":
        return Finding("link", "ok", f"{text} (gloo; says nothing about NCCL)")
    slow = SLOW_FABRIC_GB_PER_S if group.num_nodes > 1 else SLOW_NODE_GB_PER_S
    if group.gb_per_s < slow:
        return Finding(
            "link", "warning", f"{text}, below {slow:g}", "placement group, EFA, NVLink (nvidia-smi topo -m, nvlink -s)"
        )
    return Finding("link", "ok", text)


def check_store(nodes: Sequence[NodeFacts], url: str) -> Finding:
    """Each node may put, get, list and delete below `url`, and none is much slower than the others."""
    asked = {node.name: node.store for node in nodes if node.store is not None}
    if not asked:
        return Finding("store", "not applicable", "no --store URL was given")
    wrong = [f"{name}: {verb}: {why}" for name, found in asked.items() for verb, why in found.errors.items()]
    if wrong:
        return Finding(
            "store",
            "error",
            _some(wrong),
            "the nodes' role needs s3:ListBucket, GetObject, PutObject, DeleteObject (cluster/aws-setup.yaml)",
        )
    rates = {name: min(found.put_bytes_per_s, found.get_bytes_per_s) for name, found in asked.items()}
    slowest, middle = min(rates, key=rates.__getitem__), median(rates.values())
    text = (
        f"{url}: put, get, list, delete; slowest {slowest} {rates[slowest] / 1e6:.0f} MB/s, median {middle / 1e6:.0f}"
    )
    if rates[slowest] < min(SLOW_STORE_BYTES_PER_S, middle) or rates[slowest] < middle / 4:
        return Finding(
            "store", "warning", text, "same region as the bucket, a gateway endpoint for S3; look at that node"
        )
    return Finding("store", "ok", text)


def check_wandb(nodes: Sequence[NodeFacts]) -> Finding:
    """Each node reaches W&B's server and has a key; what is missing is a warning, because a run can do without."""
    silent = [f"{node.name}: {node.wandb_error}" for node in nodes if node.wandb_error]
    if silent:
        return Finding("wandb", "warning", _some(silent), "a way out (NAT gateway), or track.wandb=offline")
    keyless = [node.name for node in nodes if not node.wandb_key]
    if keyless:
        return Finding(
            "wandb",
            "warning",
            f"no WANDB_API_KEY on {_some(keyless)}",
            "~/.nltrain/env (AWS), secret nltrain-env (Kubernetes)",
        )
    return Finding("wandb", "ok", f"reached, with a key, from {_all(nodes)}")


def all_findings(nodes: Sequence[NodeFacts], group: GroupFacts, url: str) -> list[Finding]:
    """Every check once, in order: a fault that an earlier check finds may explain the later ones."""
    return [
        check_versions(nodes),
        check_driver(nodes),
        check_devices(nodes, group),
        check_clocks(nodes),
        check_shm(nodes),
        check_limits(nodes),
        check_fabric(nodes),
        check_transport(nodes, group),
        check_link(group),
        check_store(nodes, url),
        check_wandb(nodes),
    ]


def describe(findings: Sequence[Finding]) -> str:
    """One line per finding, and the number of each level."""
    lines = [
        f"{each.level:14} {each.check:10} {each.text}" + (f" -> {each.remedy}" if each.remedy else "")
        for each in findings
    ]
    counts = Counter(each.level for each in findings)
    return "\n".join([*lines, ", ".join(f"{counts[level]} {level}" for level in ("ok", "warning", "error"))])


def _all(nodes: Sequence[NodeFacts]) -> str:
    return f"all {len(nodes)} nodes" if len(nodes) > 1 else nodes[0].name


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:NAMED]) + (f"; and {len(items) - NAMED} more" if len(items) > NAMED else "")
