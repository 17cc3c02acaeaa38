"""Settings of the device hold for the process, and the log says them."""

from collections.abc import Iterator

import pytest
import torch

from nltrain.device import prepare_device
from nltrain.runtime.config import ClusterConfig


@pytest.fixture(autouse=True)
def precision_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_of_products_is_set_and_said(precision: str) -> None:
    device, said = prepare_device(ClusterConfig(matmul_precision=precision))  # type: ignore[arg-type]
    assert device.type == "cpu" and said == f"fp32 products at {precision} precision"
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_named_with_its_allocator() -> None:
    _, said = prepare_device(ClusterConfig(device="cuda", allocator="expandable_segments:True"))
    assert said.endswith("allocator expandable_segments:True") and torch.cuda.get_device_name() in said
