# What triton.jit makes of a kernel is no function to a type checker.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
"""The bits of `longtake.randomness` in one launch, where plain torch takes 150.

They are integers: the same ones on every device, with and without this kernel.

Letters: B samples, N blocks of four words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.ops.launch import launch
from longtake.ops.triton_language import tl, triton

BLOCKS_PER_PROGRAM = 256


@triton.jit
def _philox_kernel(
    epochs_ptr,  # (B,) int64
    sample_ids_ptr,  # (B,) int64
    words_ptr,  # (B, N, 4) int64
    first_block,
    num_blocks,
    stream,
    seed,
    BLOCKS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    zeros = tl.zeros((BLOCKS,), tl.uint32)
    sample_id = tl.load(sample_ids_ptr + b)
    c0 = (first_block + n).to(tl.uint32)
    c1 = zeros + (tl.load(epochs_ptr + b) << 8 | stream).to(tl.uint32)
    c2 = zeros + sample_id.to(tl.uint32)
    c3 = zeros + (sample_id >> 32).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(seed, c0, c1, c2, c3)
    words_ptr += (b * num_blocks + n) * 4
    exists = n < num_blocks
    tl.store(words_ptr, c0.to(tl.int64), mask=exists)
    tl.store(words_ptr + 1, c1.to(tl.int64), mask=exists)
    tl.store(words_ptr + 2, c2.to(tl.int64), mask=exists)
    tl.store(words_ptr + 3, c3.to(tl.int64), mask=exists)


def philox_words(
    epochs_B: Tensor,
    sample_ids_B: Tensor,
    *,
    seed: int,
    stream: int,
    first_block: int,
    num_blocks: int,
) -> Tensor:
    """Random 32-bit words as int64 (B, 4 num_blocks): Philox4x32-10 of counters made of the number
    of a block, epoch and stream, and the sample's id; its key is the seed."""
    words_BN4 = epochs_B.new_empty(len(epochs_B), num_blocks, 4, dtype=torch.int64)
    if words_BN4.numel() > 0:
        launch(
            _philox_kernel,
            (triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM), len(epochs_B)),
            epochs_B.contiguous(),
            sample_ids_B.contiguous(),
            words_BN4,
            first_block,
            num_blocks,
            stream,
            seed & 0xFFFFFFFFFFFFFFFF,
            BLOCKS=BLOCKS_PER_PROGRAM,
            num_warps=4,
        )
    return words_BN4.flatten(1)
