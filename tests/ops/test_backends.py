"""cuDNN's and FlashAttention-4's attention, and the choice between backends.

Values need a GPU. Without one, stand-ins with the signatures of the real functions show what is
passed to them and what becomes of their results; the signatures themselves are compared with
PyTorch's schemas and, where it is installed, with the package.
"""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longtake.ops import cudnn_attention, fa4_attention, kernels
from longtake.ops.attention import backend_problem, self_attention
from longtake.ops.fa4_attention import (
    RIGHT_HEAD_SIZES,
    RIGHT_HEAD_SIZES_OF_WIDE_TILES,
    padded_head_size,
)
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.ops.partial_attention import (
    accumulation_dtype,
    merge_part,
    partial_attention,
    partial_attention_backward,
)
from longtake.ops.plain_attention import attention_reference

torch.set_num_threads(1)

OPS = {
    "cudnn": (cudnn_attention._cudnn_attention, cudnn_attention._cudnn_attention_backward),
    "fa4": (fa4_attention._fa4_attention, fa4_attention._fa4_attention_backward),
}


def draw_qkv(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def with_gradient(attend, qkv, weight):
    """The output, and the gradient of qkv when the output's is `weight`."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    (gradient,) = torch.autograd.grad(out, qkv, weight)
    return out.detach(), gradient


def in_parts(name, qkv, weight, lengths):
    """Output and gradient from keys in parts of these lengths, as they travel: k beside v."""
    q, parts = qkv[:, :, 0], qkv[:, :, 1:].movedim(2, 0).contiguous().split(lengths, dim=2)
    results = [partial_attention(name, q, *part) for part in parts]
    out, lse = results[0][0].to(accumulation_dtype(q.dtype)), results[0][1]
    for part_out, part_lse in results[1:]:
        merge_part(out, lse, part_out, part_lse)
    out = out.to(q.dtype)
    gradients = [partial_attention_backward(name, weight, q, *part, out, lse) for part in parts]
    dq = sum(gradient[0].to(accumulation_dtype(q.dtype)) for gradient in gradients).to(q.dtype)
    dk, dv = (torch.cat([gradient[i] for gradient in gradients], dim=1) for i in (1, 2))
    return out, torch.stack([dq, dk, dv], dim=2)


def by_reference(qkv):
    return attention_reference(*qkv.unbind(2))


# What cuDNN and FlashAttention-4 compute, on the CPU, with their arguments, layouts and results.


def explicit_forward(q_BANE, k_BANE, v_BANE, scale):
    scores_BANN = q_BANE @ k_BANE.transpose(-1, -2) * scale
    return scores_BANN.softmax(-1) @ v_BANE, scores_BANN.logsumexp(-1).float()


def explicit_backward(dout_BANE, q_BANE, k_BANE, v_BANE, out_BANE, lse_BAN, scale):
    scores_BANN = q_BANE @ k_BANE.transpose(-1, -2) * scale
    weights_BANN = (scores_BANN - lse_BAN[..., None]).exp()
    delta_BAN1 = (dout_BANE * out_BANE).sum(-1, keepdim=True)
    dscores_BANN = weights_BANN * (dout_BANE @ v_BANE.transpose(-1, -2) - delta_BAN1) * scale
    dv_BANE = weights_BANN.transpose(-1, -2) @ dout_BANE
    return dscores_BANN @ k_BANE, dscores_BANN.transpose(-1, -2) @ q_BANE, dv_BANE


def aten_forward(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    assert attn_bias is None
    assert compute_log_sumexp
    assert (dropout_p, is_causal, return_debug_mask, scale) == (0.0, False, False, None)
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out, lse = explicit_forward(query, key, value, query.shape[-1] ** -0.5)
    out = torch.empty_like(query).copy_(out)
    seed = torch.empty((), dtype=torch.int64)
    num_tokens = query.shape[2]
    return out, lse[..., None], None, None, num_tokens, num_tokens, seed, seed, None


def aten_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    attn_bias,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    assert attn_bias is cum_seq_q is cum_seq_k is None
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert (dropout_p, is_causal, scale) == (0.0, False, None)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert grad_out.stride() == out.stride()  # the backward graph's layout is not in cuDNN's cache
    return explicit_backward(
        grad_out, query, key, value, out, logsumexp[..., 0], query.shape[-1] ** -0.5
    )


def fa4_forward(q, k, v, *, softmax_scale, return_lse):
    assert q.shape[-1] in RIGHT_HEAD_SIZES_OF_WIDE_TILES
    assert return_lse
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = explicit_forward(q, k, v, softmax_scale)
    return out.transpose(1, 2).contiguous(), lse


def fa4_backward(q, k, v, out, dout, lse, *, softmax_scale, deterministic, dq, dk, dv):
    assert q.shape == out.shape == dout.shape == dq.shape
    assert k.shape == v.shape == dk.shape == dv.shape
    assert q.shape[-1] in RIGHT_HEAD_SIZES
    assert not deterministic
    inputs = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = explicit_backward(*inputs, lse, softmax_scale)
    for gradient, x in zip((dq, dk, dv), gradients, strict=True):
        gradient.copy_(x.transpose(1, 2))
    return dq, dk, dv


@pytest.fixture
def stand_ins(monkeypatch):
    aten = SimpleNamespace(
        _scaled_dot_product_cudnn_attention=aten_forward,
        _scaled_dot_product_cudnn_attention_backward=aten_backward,
    )
    monkeypatch.setattr(cudnn_attention, "aten", aten)
    package = SimpleNamespace(_flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward)
    monkeypatch.setattr(fa4_attention, "_package", lambda: package)


LAYOUTS = {
    "packed": lambda qkv: qkv,
    "sliced": lambda qkv: torch.cat((qkv, qkv), dim=1)[:, : qkv.shape[1]],
    "heads_first": lambda qkv: qkv.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("head_size", [8, 64, 72])
@pytest.mark.parametrize("name", OPS)
def test_op_passes_arguments_and_packs_the_gradient(name, head_size, layout, stand_ins):
    qkv = draw_qkv(2, 5, 3, 2, head_size)
    weight = draw_qkv(2, 2, 5, head_size).transpose(1, 2)  # not contiguous
    expected = with_gradient(by_reference, qkv, weight)
    result = with_gradient(lambda x: OPS[name][0](x)[0], layout(qkv), weight)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)  # the log-sum-exp is fp32
    assert all(x.is_contiguous() for x in result)


@pytest.mark.parametrize("name", OPS)
def test_parts_of_the_keys_make_up_the_whole(name, stand_ins):
    qkv = draw_qkv(2, 7, 3, 2, 72)
    weight = draw_qkv(2, 2, 7, 72).transpose(1, 2)
    expected = with_gradient(by_reference, qkv, weight)
    result = in_parts(name, qkv, weight, [3, 4])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_op_is_well_formed(name, stand_ins):
    qkv = draw_qkv(2, 5, 3, 2, 64).requires_grad_()
    torch.library.opcheck(OPS[name][0], (qkv,))
    out, lse = OPS[name][0](qkv.detach())
    arguments = (out, qkv.detach(), out, lse)
    torch.library.opcheck(OPS[name][1], arguments)


@pytest.mark.parametrize("name", OPS)
def test_op_compiles_whole(name, stand_ins):
    def step(x):
        return OPS[name][0](x * 2)[0].flatten(2) + 1

    qkv = draw_qkv(2, 5, 3, 2, 8)
    weight = draw_qkv(2, 5, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        with_gradient(compiled, qkv, weight), with_gradient(step, qkv, weight)
    )


@pytest.mark.parametrize(
    ("real", "stand_in"),
    [
        ("_scaled_dot_product_cudnn_attention", aten_forward),
        ("_scaled_dot_product_cudnn_attention_backward", aten_backward),
    ],
)
def test_stand_in_has_the_schema_of_pytorch(real, stand_in):
    arguments = getattr(torch.ops.aten, real).default._schema.arguments
    parameters = inspect.signature(stand_in).parameters.values()
    assert [(x.name, x.kwarg_only) for x in arguments] == [
        (x.name, x.kind == x.KEYWORD_ONLY) for x in parameters
    ]
    for argument, parameter in zip(arguments, parameters, strict=True):
        has_default = parameter.default is not parameter.empty
        assert argument.has_default_value() == has_default
        assert not has_default or argument.default_value == parameter.default


def test_calls_fit_the_installed_flash_attention_4():
    interface = pytest.importorskip("flash_attn.cute.interface")
    for real, stand_in in (
        (interface._flash_attn_fwd, fa4_forward),
        (interface._flash_attn_bwd, fa4_backward),
    ):
        mine, theirs = inspect.signature(stand_in).parameters, inspect.signature(real).parameters
        positional = [name for name, x in mine.items() if x.kind != x.KEYWORD_ONLY]
        assert list(theirs)[: len(positional)] == positional
        assert set(mine) <= set(theirs)


def same_layout(results, expected):
    return [(x.shape, x.stride(), x.dtype, x.device) for x in results] == [
        (x.shape, x.stride(), x.dtype, x.device) for x in expected
    ]


def run_body(operation, *arguments):
    """What the dispatcher calls for a GPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.library.get_kernel(operation, "CUDA").call_boxed(keys, *arguments)


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 72), (1, 4, 3, 2, 64), (3, 1, 3, 1, 8)], ids=str)
def test_cudnn_op_promises_the_layout_that_pytorch_makes(shape):
    """The operation's body, traced with PyTorch's own shape rules, against its shape rule."""
    forward, backward = OPS["cudnn"]
    with FakeTensorMode():
        qkv = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        body, promise = run_body(forward, qkv), forward(qkv)
        assert same_layout(body, promise)
        assert promise[0].is_contiguous()
        body_gradient = run_body(backward, promise[0], qkv, *promise)
        assert same_layout([body_gradient], [backward(promise[0], qkv, *promise)])
        assert body_gradient.shape == shape
        assert body_gradient.is_contiguous()


def test_heads_are_padded_to_a_size_that_is_right():
    assert {size: padded_head_size(size) for size in (8, 32, 63, 64, 72, 80, 88, 96, 104, 128)} == {
        8: 64,
        32: 64,
        63: 64,
        64: 64,
        72: 96,
        80: 96,
        88: 96,
        96: 96,
        104: 128,
        128: 128,
    }
    with pytest.raises(ValueError, match="takes heads up to 128, not 136"):
        padded_head_size(136)


def test_tiles_of_the_backward_are_as_wide_as_its_other_kernels_take_them_to_be(monkeypatch):
    class Backward:
        def __init__(self, dtype, head_dim, head_dim_v=None, *, tile_m=64):
            sizes = head_dim, head_dim_v or head_dim
            self.tile_hdim, self.tile_hdimv = (-(-size // 16) * 16 for size in sizes)
            self.tile_m = tile_m
            self.check_hdim_oob = self.check_hdim_v_oob = None

    def backward():
        pass

    backward.compile_cache = {"as it was": None}
    package = ModuleType("flash_attn.cute.cache_utils")
    package.JITCache = dict
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.cache_utils", package)
    interface = SimpleNamespace(FlashAttentionBackwardSm90=Backward, _flash_attn_bwd=backward)
    fa4_attention._widen_tiles(interface)
    assert fa4_attention._has_wide_tiles(interface)
    assert backward.compile_cache == {}
    for head_size, width in ((64, 64), (72, 96), (80, 96), (96, 96), (128, 128)):
        made = interface.FlashAttentionBackwardSm90("dtype", head_size, tile_m=80)
        assert (made.tile_hdim, made.tile_hdimv, made.tile_m) == (width, width, 80)
        assert made.check_hdim_oob == made.check_hdim_v_oob == (width != head_size)
        assert padded_head_size(head_size, has_wide_tiles=True) == head_size


# The choice.


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_self_attention_takes_the_named_backend(name, monkeypatch):
    qkv, weight = draw_qkv(2, 5, 3, 2, 8), draw_qkv(2, 5, 2, 8)
    taken = []
    from longtake.ops import attention

    original = attention._BACKENDS[name]
    monkeypatch.setitem(
        attention._BACKENDS, name, lambda *qkv: taken.append(name) or original(*qkv)
    )
    with kernels_as(KernelConfig(self_attention=name)):
        result = with_gradient(self_attention, qkv, weight)
    torch.testing.assert_close(result, with_gradient(by_reference, qkv, weight))
    assert taken == [name]


@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_self_attention_dispatches_to_the_fused_backend(name, stand_ins, monkeypatch):
    qkv, weight = draw_qkv(2, 5, 3, 2, 72), draw_qkv(2, 5, 2, 72)
    module = {"cudnn": cudnn_attention, "fa4": fa4_attention}[name]
    monkeypatch.setattr(module, f"{name}_problem", lambda *arguments: None)
    with kernels_as(KernelConfig(self_attention=name)):
        result = with_gradient(self_attention, qkv, weight)
    expected = with_gradient(by_reference, qkv, weight)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_self_attention_compiles_whole():
    qkv, weight = draw_qkv(2, 5, 3, 2, 8), draw_qkv(2, 5, 2, 8)
    compiled = torch.compile(self_attention, fullgraph=True, backend="aot_eager")
    result = with_gradient(compiled, qkv, weight)
    torch.testing.assert_close(result, with_gradient(by_reference, qkv, weight))


@pytest.mark.parametrize("name", ["cudnn", "fa4"])
def test_insisting_on_a_gpu_backend_on_the_cpu_says_why(name):
    with (
        kernels_as(KernelConfig(self_attention=name)),
        pytest.raises(
            ValueError, match=rf'"{name}" cannot run here: it needs a CUDA device, not cpu; use "au'
        ),
    ):
        self_attention(draw_qkv(1, 2, 3, 1, 8, dtype=torch.bfloat16))


def test_insisting_on_triton_on_the_cpu_says_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        kernels_as(KernelConfig(self_attention="triton")),
        pytest.raises(ValueError, match='"triton" cannot run here: '),
    ):
        self_attention(draw_qkv(1, 2, 3, 1, 8))


def test_problems_name_the_value_and_what_is_needed(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(kernels, "has_cudnn_attention", lambda device: True)
    assert backend_problem("cudnn", gpu, torch.bfloat16, 72) is None
    assert "not float32" in backend_problem("cudnn", gpu, torch.float32, 72)
    assert "up to 128, not 136" in backend_problem("cudnn", gpu, torch.float16, 136)
    assert "multiple of 8 up to 128, not 36" in backend_problem("cudnn", gpu, torch.float16, 36)
    assert "not float32" in backend_problem("fa4", gpu, torch.float32, 72)
    assert "up to 128, not 136" in backend_problem("fa4", gpu, torch.float16, 136)
    assert "9.0 or newer" in backend_problem("fa4", gpu, torch.float16, 72)
    assert backend_problem("sdpa", gpu, torch.float32, 136) is None


def test_missing_flash_attention_4_is_an_error_that_says_how_to_install_it(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # Also where it is there, and imported.
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, None)
    fa4_attention._package.cache_clear()
    problem = backend_problem("fa4", gpu, torch.bfloat16, 72)
    assert "FlashAttention-4 cannot be imported" in problem
    assert "pip install --pre flash-attn-4==" in problem

    monkeypatch.delitem(sys.modules, "flash_attn.cute.interface")
    parent, child = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    child.interface = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "flash_attn", parent)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", child)
    assert backend_problem("fa4", gpu, torch.bfloat16, 72) is None
    fa4_attention._package.cache_clear()


# Values, where there is a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 256, 3, 4, 72), (2, 1000, 3, 4, 72), (1, 2049, 3, 2, 72), (2, 1000, 3, 4, 64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", OPS)
def test_values_on_a_gpu(name, shape, dtype, is_compiled):
    problem = backend_problem(name, torch.device("cuda"), dtype, shape[-1])
    if problem:
        pytest.skip(problem)
    qkv = draw_qkv(*shape, dtype=dtype, device="cuda")
    weight = draw_qkv(*shape[:2], *shape[3:], dtype=dtype, device="cuda")

    def attend(x):
        return self_attention(x * 1)  # as a product in the graph

    with kernels_as(KernelConfig(self_attention=name)):
        torch._dynamo.reset()
        result = with_gradient(
            torch.compile(attend, fullgraph=True) if is_compiled else attend, qkv, weight
        )
    assert all(x.is_contiguous() for x in result)
    assert_as_exact(result, qkv, weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(512, 512), (1000, 1000, 48)], ids=str)
@pytest.mark.parametrize("head_size", [64, 72])
@pytest.mark.parametrize("name", [*OPS, "reference"])
def test_values_in_parts_on_a_gpu(name, head_size, lengths, dtype):
    problem = backend_problem(name, torch.device("cuda"), dtype, head_size)
    if problem:
        pytest.skip(problem)
    qkv = draw_qkv(2, sum(lengths), 3, 4, head_size, dtype=dtype, device="cuda")
    weight = draw_qkv(2, sum(lengths), 4, head_size, dtype=dtype, device="cuda")
    # The gradient of q is a sum over parts, each of them rounded.
    assert_as_exact(in_parts(name, qkv, weight, list(lengths)), qkv, weight, times=4)


def assert_as_exact(result, qkv, weight, *, times=2):
    """As near to float64 as so many times the error of explicit scores in the dtype of qkv."""
    plain = with_gradient(by_reference, qkv, weight)
    exact = with_gradient(by_reference, qkv.double(), weight.double())
    for tensor, ours, theirs, right in zip(("out", "dqkv"), result, plain, exact, strict=True):
        error, allowed = (ours - right).abs().max(), times * (theirs - right).abs().max()
        assert error <= allowed + 1e-3 * right.abs().max(), tensor
