import pytest

from longtake.planning import peak_bf16_flops


@pytest.mark.parametrize(
    ("device_name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_peak_is_found_by_the_drivers_name(device_name, flops):
    assert peak_bf16_flops(device_name) == flops


@pytest.mark.parametrize("device_name", ["", "cpu", "NVIDIA H20", "NVIDIA A10", "NVIDIA L4"])
def test_unknown_devices_have_no_peak(device_name):
    assert peak_bf16_flops(device_name) is None
