"""A device passes the probe when each part is right, and is refused when one part returns one wrong value."""

import pytest
import torch

from nltrain.runtime.probe import DeviceRefusedError, driver_problem, probe, probe_compute, probe_link, probe_memory

CPU = torch.device("cpu")


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
