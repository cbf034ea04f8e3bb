"""The kernel's bits against those of `longtake.randomness` in plain torch: the same integers."""

from __future__ import annotations

import pytest
import torch

from longtake import randomness
from longtake.ops.philox import philox_words
from longtake.randomness import SampleKeys, Stream

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = SampleKeys(
    seed=0,
    epochs_B=torch.tensor([0, 7, 2**24 - 1]),
    sample_ids_B=torch.tensor([3, 2**40 + 5, 2**63 - 1]),
)


@pytest.mark.parametrize("seed", [0, 1, 16, 0x0123_4567_89AB_CDEF, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(("first_block", "num_blocks"), [(0, 1), (3, 300), (2**31 + 1, 5), (0, 0)])
def test_kernel_draws_the_same_words(seed: int, first_block: int, num_blocks: int):
    keys = SampleKeys(seed, KEYS.epochs_B, KEYS.sample_ids_B)
    expected = randomness._bits(keys, Stream.SAMPLER, 4 * num_blocks, 4 * first_block)
    found = philox_words(
        keys.epochs_B.to(DEVICE),
        keys.sample_ids_B.to(DEVICE),
        seed=seed,
        stream=int(Stream.SAMPLER),
        first_block=first_block,
        num_blocks=num_blocks,
    )
    assert found.dtype == torch.int64
    assert found.cpu().equal(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("draw", [randomness.uniform, randomness.normal])
def test_a_gpu_draws_what_a_cpu_draws(draw):
    expected = draw(KEYS, Stream.NOISE, (5, 7), offset=3)
    found = draw(KEYS.to("cuda"), Stream.NOISE, (5, 7), offset=3).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
