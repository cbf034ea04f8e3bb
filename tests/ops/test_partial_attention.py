"""Parts of the keys, merged, are attention to all of them. The fused ones are in test_backends."""

import pytest
import torch

from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.ops.partial_attention import merge_part, partial_attention, pick_partial_backend
from tests.ops.test_backends import by_reference, draw_qkv, in_parts, with_gradient

WHERE = {"keys": 8, "head_size": 8, "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.mark.parametrize("lengths", [[9], [4, 5], [1, 5, 3]], ids=str)
def test_parts_of_the_keys_make_up_the_whole(lengths):
    qkv = draw_qkv(2, 9, 3, 2, 8)
    weight = draw_qkv(2, 2, 9, 8).transpose(1, 2)
    expected = with_gradient(by_reference, qkv, weight)
    torch.testing.assert_close(
        in_parts("reference", qkv, weight, lengths), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("largest", ["first", "last"])
def test_scores_whose_exponentials_overflow_are_merged(largest):
    q_BNAE, k_BLAE, v_BLAE = draw_qkv(1, 6, 3, 1, 8, dtype=torch.float32).unbind(2)
    grown = slice(0, 3) if largest == "first" else slice(3, 6)
    k_BLAE = k_BLAE.clone()
    k_BLAE[:, grown] *= 1000
    expected, expected_lse = partial_attention("reference", q_BNAE, k_BLAE, v_BLAE)
    assert expected_lse.abs().max() > 300
    out, lse = partial_attention("reference", q_BNAE, k_BLAE[:, :3], v_BLAE[:, :3])
    merge_part(out, lse, *partial_attention("reference", q_BNAE, k_BLAE[:, 3:], v_BLAE[:, 3:]))
    torch.testing.assert_close((out, lse), (expected, expected_lse))


def test_half_precision_is_added_up_in_single():
    qkv = draw_qkv(1, 8, 3, 2, 8, dtype=torch.bfloat16)
    out, lse = partial_attention("reference", *qkv.unbind(2))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_auto_takes_what_tells_its_log_sum_exp():
    with kernels_as(KernelConfig()):
        assert pick_partial_backend(**WHERE) == "reference"
    with kernels_as(PLAIN):
        assert pick_partial_backend(**WHERE) == "reference"


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_what_does_not_tell_it_is_refused_by_name(name):
    message = rf'self-attention by "{name}" does not tell .*: set .* auto, fa4, cudnn, reference'
    with (
        kernels_as(KernelConfig(self_attention=name)),
        pytest.raises(ValueError, match=message),
    ):
        pick_partial_backend(**WHERE)


def test_what_cannot_run_here_is_refused_with_the_reason():
    with (
        kernels_as(KernelConfig(self_attention="cudnn")),
        pytest.raises(ValueError, match='by "cudnn" cannot run here: it needs a CUDA device'),
    ):
        pick_partial_backend(**WHERE)
