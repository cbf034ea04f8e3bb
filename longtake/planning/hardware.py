"""What accelerators can do at best, by the name the driver reports."""

from __future__ import annotations

import re

# Dense bf16 tensor-core FLOP/s, first match wins. Source: the maker's data sheets, whose figures
# with sparsity are twice these. Not measured: clocks and power limits keep real kernels below.
_BF16_FLOPS = (
    ({"H100", "PCIE"}, 756e12),
    ({"H800", "PCIE"}, 756e12),
    ({"H100", "NVL"}, 835e12),
    ({"H200", "NVL"}, 835e12),
    ({"H100"}, 989e12),
    ({"H200"}, 989e12),
    ({"H800"}, 989e12),
    ({"A100"}, 312e12),
    ({"A800"}, 312e12),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device such as "NVIDIA H200"; None if it is not in the table."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    for required, flops in _BF16_FLOPS:
        if required <= words:
            return flops
    return None
