import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Before any library reads it: these tests must never wait for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


class NoHostReads(TorchDispatchMode):
    """Refuses the operations by which Python reads a tensor's values: on a GPU each is a wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"host reads values: {name}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads() -> NoHostReads:
    return NoHostReads()
