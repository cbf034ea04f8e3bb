"""Lists of tensors as a kernel finds them that works on all of them in one launch.

The addresses lie in a table on the device, and the tensors are cut into chunks, one for each
program of the kernel. Letters: P tensors, R lists of tensors, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Elements that one program works on: enough that its start costs nothing, and few enough that the
# programs of a large model come in many waves, whose last one is short.
CHUNK = 16_384


class TensorTable:
    """Remembers what it wrote, so that writing the same lists again costs the host a comparison.

    Keep one for each place that calls a kernel step after step. Between the steps tensors may move,
    as gradients do; `write` must be called before every launch.
    """

    def __init__(self) -> None:
        self._written_RP = np.empty((0, 0), np.int64)
        self._sizes_P = np.empty(0, np.int64)
        self.addresses_RP = torch.empty(0, dtype=torch.int64)
        """In bytes."""
        self.sizes_P = torch.empty(0, dtype=torch.int64)
        """In elements."""
        self.chunks_2C = torch.empty(0, dtype=torch.int32)
        """The tensor of each chunk, and its place among the chunks of this tensor."""

    @property
    def num_chunks(self) -> int:
        return self.chunks_2C.shape[-1]

    def write(self, *lists: Sequence[Tensor]) -> None:
        """Lists of equally many tensors, one row of addresses for each list.

        The chunks are those of the first list. No host waits: the copies to the device come from
        pinned memory, which PyTorch does not hand out again before they are done.
        """
        device = lists[0][0].device
        addresses_RP = np.array([[t.data_ptr() for t in tensors] for tensors in lists], np.int64)
        sizes_P = np.array([t.numel() for t in lists[0]], np.int64)
        has_moved = device != self.addresses_RP.device
        if has_moved or not np.array_equal(addresses_RP, self._written_RP):
            self.addresses_RP = _to_device(addresses_RP, device)
            self._written_RP = addresses_RP
        if has_moved or not np.array_equal(sizes_P, self._sizes_P):
            self.sizes_P = _to_device(sizes_P, device)
            self.chunks_2C = _to_device(_chunks(sizes_P), device)
            self._sizes_P = sizes_P


def _chunks(sizes_P: np.ndarray) -> np.ndarray:
    """(2, C): every tensor's number once for each of its chunks, and the chunk's place in it."""
    counts_P = -(-sizes_P // CHUNK)
    tensor_C = np.repeat(np.arange(len(sizes_P)), counts_P)
    first_P = np.cumsum(counts_P) - counts_P
    place_C = np.arange(len(tensor_C)) - first_P[tensor_C]
    return np.stack([tensor_C, place_C]).astype(np.int32)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
