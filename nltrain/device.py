"""The device of a rank, and the settings of torch that hold for the whole process on it."""

import torch

from nltrain.runtime.config import ClusterConfig


def prepare_device(cluster: ClusterConfig) -> tuple[torch.device, str]:
    """Applies `cluster.matmul_precision` and `cluster.allocator`; returns this rank's device and a line for the log.

    Call it before anything is allocated on the device. Calling it again changes nothing.
    """
    torch.set_float32_matmul_precision(cluster.matmul_precision)
    said = f"fp32 products at {cluster.matmul_precision} precision"
    if cluster.device != "cuda":
        return torch.device(cluster.device), said
    device = torch.device("cuda", torch.cuda.current_device())
    if cluster.allocator:
        torch._C._accelerator_setAllocatorSettings(cluster.allocator)
        said += f", allocator {cluster.allocator}"
    return device, f"{torch.cuda.get_device_name(device)}: {said}"
