"""Without a GPU, Triton kernels run in Triton's interpreter: slow, on the CPU, same arithmetic."""

import os

import torch

# Read when a kernel is defined, so before anything imports one.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
