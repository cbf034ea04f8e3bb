"""Without a GPU, Triton kernels run in Triton's interpreter: slow, on the CPU, same arithmetic."""

import importlib.util
import os

import torch

# Read when a kernel is defined, so before anything imports one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from tests.ops.interpreted_bfloat16 import correct_bfloat16

    correct_bfloat16()
