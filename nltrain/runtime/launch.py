"""Puts a run on a Ray cluster: one Ray Train worker per rank, restarted as a group when one is lost.

Ray decides where ranks live and when to try again; what a resumed run continues from is decided by our own committed
checkpoints, so nothing is registered with Ray and a resubmitted job resumes exactly like a restarted group.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nltrain.config import RunConfig, describe, from_dict, override, to_dict
from nltrain.runtime.config import ClusterConfig

ADDRESS_VARIABLE = "RAY_ADDRESS"
ROOT = Path(__file__).resolve().parents[2]


class LaunchError(RuntimeError):
    """The run could not be put on the cluster, or ended there with an error."""


def main(config: RunConfig, arguments: Sequence[str] | None = None) -> int:
    """What every job file calls: overrides from the command line, `--dry-run`, then the run. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = "--dry-run" in arguments
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {Path(sys.argv[0]).name} [--dry-run] [field=value ...]\n\n{describe(config)}")
        return 0
    try:
        config = override(config, [argument for argument in arguments if argument != "--dry-run"])
        if dry_run:
            from nltrain.dry_run import dry_run as show

            print(describe(config), show(config), sep="\n\n")
            return 0
        launch(config)
    except (ValueError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def launch(config: RunConfig) -> dict[str, Any]:
    """Run `config` on the cluster at RAY_ADDRESS, wait for its end, return Ray's last metrics. Raises LaunchError."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise LaunchError(
            f"{ADDRESS_VARIABLE} is not set: start this file with `ray job submit --working-dir . -- python jobs/...`, "
            f"or set {ADDRESS_VARIABLE} to your cluster's host:port"
        )
    print(describe(config), flush=True)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(config.cluster.health_check_interval_s))
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _connect(ray, address)
    cluster = config.cluster
    workers: int | tuple[int, int] = cluster.max_workers
    if cluster.min_workers not in (None, cluster.max_workers):
        workers = (cluster.min_workers or 1, cluster.max_workers)
    gpus = {"GPU": 1} if cluster.device == "cuda" else {}
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=to_dict(config),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": cluster.cpus_per_worker} | gpus,
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(cluster.process_group_timeout_s)),
        run_config=RayRunConfig(
            # A name of its own each time: Ray would otherwise resume its view of an earlier job.
            name=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(Path(config.output) / "ray_train"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": _worker_environment(cluster)},
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise LaunchError(_reason(error)) from error
    return result.metrics or {}


def train_on_worker(values: dict[str, Any]) -> None:
    """One rank of the run, in the process that Ray Train made for it."""
    import ray.train

    from nltrain.loop import train
    from nltrain.runtime.jit import clear_stale_locks

    clear_stale_locks()
    _quiet_libraries()
    config = from_dict(RunConfig, values)
    try:
        train(config)
    except Exception:
        # Ray shows the traceback of one rank only, and late; the job's log gets each one now.
        traceback.print_exc()
        raise
    ray.train.report({})


def _quiet_libraries() -> None:
    """Our own log lines to the job's log; DeepSpeed's use of a deprecated torch name is not the user's business."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stdout, force=True)
    logging.getLogger("nltrain").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")


def _connect(ray: Any, address: str) -> None:
    try:
        # The code travels with the run, so that it need not be installed on the nodes.
        runtime_env = {"py_modules": [str(ROOT / "nltrain"), str(ROOT / "kernels")]}
        ray.init(address=address, log_to_driver=True, logging_level="WARNING", runtime_env=runtime_env)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address} ({first}): check the address and "
            f"RAY_AUTH_TOKEN_PATH"
        ) from error


def _worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(cluster.threads_per_worker), "DS_ACCELERATOR": cluster.device}
    if cluster.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _reason(error: BaseException) -> str:
    """The innermost message of Ray's nested errors: what the user has to read."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = sorted(failures.items())[0]
        text = str(first).strip().splitlines()
        return f"rank {rank} failed: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__
