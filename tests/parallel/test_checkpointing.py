"""What blocks do not keep, they compute again: the same loss and gradients under every policy, with
no more in memory than it says."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.models import init_weights
from longtake.models.layers import GatedMlp
from longtake.ops import attended, cudnn_attention, flash_attention
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as
from longtake.ops.partial_attention import (
    partial_attention_backward_reference,
    partial_attention_reference,
)
from longtake.parallel import ParallelConfig, branches
from longtake.parallel.activation_checkpointing import checkpoint_blocks
from longtake.parallel.compile import compile_blocks
from tests.parallel.sequence_cases import (
    BATCH,
    EVEN,
    IMAGE,
    NAMES,
    SIZES,
    UNEVEN,
    Case,
    assert_same,
    build,
    checkpointed,
    inputs_of,
    loss_of,
    to_device,
    write_shaken,
)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_gradients_of_one_that_keeps_everything(name, monkeypatch):
    in_pieces = [("nested", True, UNEVEN, 40), ("nested", False, IMAGE, 1)]
    whole = [("nested", False, EVEN, 2**16), ("full", True, EVEN, 2**16)]
    for policy, offload, latents, piece_tokens in in_pieces + (whole if name == "stdit" else []):
        monkeypatch.setattr(branches, "PIECE_TOKENS", piece_tokens)
        case = Case(name, latents=latents)
        model = checkpointed(case, policy, offload=offload)
        loss = loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found = float(loss.detach()), gradients
        assert_same(found, case, tolerance=1e-12, dtype=torch.float64)


@pytest.mark.parametrize("policy", ["full", "nested"])
def test_all_before_a_branch_may_be_frozen(policy, monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 40)
    case, found = Case("stdit"), {}
    for name in ("none", policy):
        model = checkpointed(case, name)
        for key, param in model.named_parameters():
            param.requires_grad_(key == "blocks.0.attn.qkv.bias")
        loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64)).backward()
        found[name] = model.blocks[0].attn.qkv.bias.grad
    torch.testing.assert_close(found[policy], found["none"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["full", "nested"])
def test_the_last_blocks_may_be_kept(policy, monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 40)
    case = Case("stdit", depth=3)
    model = checkpointed(case, policy, offload=True, kept_blocks=1)
    ran = Counter()
    for number, block in enumerate(model.blocks):
        for module in (block.attn, block.mlp):
            forward = module.forward

            def counted(*args, _forward=forward, _number=number):
                ran[_number] += torch.is_grad_enabled()
                return _forward(*args)

            module.forward = counted
    loss = loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64))
    loss.backward()
    assert ran == {0: 4, 1: 4, 2: 2}, "twice forward and twice again, but the last"
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same((float(loss.detach()), gradients), case, tolerance=1e-12, dtype=torch.float64)


@pytest.mark.parametrize("name", ["stdit2", "latte", "pixart"])
def test_self_attention_may_be_left_whole(name):
    case, ran = Case(name), Counter()
    for pieces in ("all", "pointwise"):
        model = checkpointed(case, "nested", pieces=pieces)
        block = model.blocks[0]
        block.attn.core.register_forward_hook(lambda *_, pieces=pieces: ran.update([pieces]))
        loss = loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64))
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same((float(loss.detach()), gradients), case, tolerance=1e-12, dtype=torch.float64)
    assert ran == {"all": 3, "pointwise": 2}


def test_pieces_are_refused_where_nothing_is_nested():
    with pytest.raises(ValueError, match=r"pieces=pointwise .*=full: only with nested"):
        ParallelConfig(checkpointing="full", pieces="pointwise")


def test_blocks_to_be_kept_are_counted():
    with pytest.raises(ValueError, match=r"kept_blocks=2 .*checkpointing=none: expected 0"):
        ParallelConfig(checkpointing="none", kept_blocks=2)
    with pytest.raises(ValueError, match="kept_blocks=-1"):
        ParallelConfig(checkpointing="full", kept_blocks=-1)


class _Storages(TorchDispatchMode):
    """Notes what is allocated within the context."""

    def __init__(self):
        super().__init__()
        self._noted = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._noted.update(
            leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)
        )
        return out

    def alive(self) -> int:
        """Bytes of it that are still held, by whomever: also by cycles that nobody collects."""
        return sum(storage.nbytes() for storage in self._noted)


def test_nothing_of_a_piece_outlives_it(monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 40)
    case, kept = Case("stdit"), {}
    for policy in ("full", "nested"):
        model = checkpointed(case, policy, offload=False)
        inputs = inputs_of(case, range(BATCH), dtype=torch.float64)
        with _Storages() as storages:
            loss = loss_of(model, case, inputs)
            kept[policy] = storages.alive()
            loss.backward()
        del loss
        # Views were taken of the weights: they are among what was noted.
        weights = sum(p.nbytes for p in model.parameters())
        assert storages.alive() <= 2.05 * weights, policy
    assert kept["nested"] <= 1.05 * kept["full"]


def test_gradients_of_pieces_are_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 1)
    mlp = GatedMlp(8, 32).bfloat16()
    branches.run_in_pieces(mlp)
    x_BND = torch.randn(1, 600, 8, dtype=torch.bfloat16, requires_grad=True)
    row_B1D = torch.ones(1, 1, 8, dtype=torch.bfloat16)
    mlp(x_BND, row_B1D, row_B1D, row_B1D).sum().backward()
    # One from each token: in bf16, 256 and 1 are 256.
    assert mlp.fc2.bias.grad is not None
    assert mlp.fc2.bias.grad.tolist() == [600] * 8


def test_pieces_cover_all_rows_and_are_equal_where_that_can_be():
    def lengths(shape: tuple[int, ...], dim: int | None) -> list[int]:
        pieces = branches._pieces(torch.empty(shape, device="meta"), dim)
        assert [piece.first for piece in pieces] == [
            sum(piece.length for piece in pieces[:i]) for i in range(len(pieces))
        ]
        return [piece.length for piece in pieces]

    # Half a minute of 1080p: frames of 8,160 tokens, then places of 360.
    assert lengths((1, 180, 8160, 1152), 1) == [6] * 30
    assert lengths((1, 360, 4080, 1152), 2) == [170] * 24
    assert lengths((1, 16, 256, 1152), 1) == [16]
    assert lengths((2, 65_537, 8), 1) == [2**15, 2**15, 1]
    assert lengths((1, 2**18, 8), None) == [2**18]


def test_inference_gives_the_same_in_pieces(monkeypatch):
    case = Case("stdit2", latents=EVEN)
    losses = []
    for piece_tokens in (2**16, 24):
        monkeypatch.setattr(branches, "PIECE_TOKENS", piece_tokens)
        model = checkpointed(case, "nested", offload=True)
        with torch.no_grad():
            losses.append(
                float(loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64)))
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_block_computed_again_keeps_the_inputs_of_its_branches_alone():
    case = Case("stdit", latents=EVEN)
    x_BTSD = torch.randn(2, 4, 8, 32, dtype=torch.float64, requires_grad=True)
    rest = (
        torch.randn(2, 6, 32, dtype=torch.float64),
        torch.randn(2, 5, 32, dtype=torch.float64),
        None,
    )

    def kept_by(policy: str) -> int:
        block = checkpointed(case, "none", offload=False).blocks[0]
        if policy == "nested":
            for branch in branches.branches_of(block):
                branches.run_in_pieces(branch)
        kept = []

        def note(tensor):
            if tensor.numel() >= x_BTSD.numel():
                kept.append(tensor.numel() // x_BTSD.numel())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            block(x_BTSD, *rest)
        return sum(kept)

    assert kept_by("nested") == 4, "one for each of the four branches"
    assert kept_by("none") > 20


def test_the_last_branch_of_a_block_is_computed_once_less_than_the_others():
    case, counts = Case("stdit", latents=EVEN), Counter()
    model = build(case)
    init_weights(model, seed=0, write=write_shaken)

    def counted(name, forward):
        def run(*args):
            counts[name] += 1
            return forward(*args)

        return run

    for name in ("attn", "attn_temp", "cross_attn", "mlp"):
        branch = getattr(model.blocks[0], name)
        branch.forward = counted(name, branch.forward)
    checkpoint_blocks(model.blocks, "nested")
    loss_of(model, case, inputs_of(case, range(BATCH))).backward()
    assert counts == {"attn": 3, "attn_temp": 3, "cross_attn": 3, "mlp": 2}


def _plain_attention(monkeypatch) -> Counter:
    """Puts plain torch in place of our kernels of attention, within the operation, and counts by
    the number of keys how often it computes."""
    counts = Counter()

    def launch_forward(qkv_BN3AE):
        counts[qkv_BN3AE.shape[1]] += 1
        out_BNAE, lse_BAN = partial_attention_reference(*qkv_BN3AE.unbind(2))
        tiles = flash_attention.forward_tiles(*qkv_BN3AE.shape[1::3], qkv_BN3AE.dtype)
        return out_BNAE, F.pad(lse_BAN, (0, -lse_BAN.shape[-1] % tiles.queries))

    def launch_backward(dout_BNAE, qkv_BN3AE, out_BNAE, lse_BAR):
        q_kv = qkv_BN3AE.unbind(2)
        lse_BAN = lse_BAR[..., : qkv_BN3AE.shape[1]]
        gradients = partial_attention_backward_reference(dout_BNAE, *q_kv, out_BNAE, lse_BAN)
        return torch.stack(gradients, dim=2)

    monkeypatch.setattr(flash_attention, "flash_problem", lambda *_: None)
    monkeypatch.setattr(flash_attention, "launch_forward", launch_forward)
    monkeypatch.setattr(flash_attention, "launch_backward", launch_backward)
    return counts


_ALONG_SPACE = replace(PLAIN, self_attention="triton")


@pytest.mark.parametrize(
    ("name", "latents", "keys", "pieces", "compiled"),
    [
        ("stdit", UNEVEN, 9, 3, True),
        ("stdit2", EVEN, 8, 2, False),
        ("latte", EVEN, 8, 2, False),
        ("pixart", EVEN, 32, 1, True),
    ],
)
def test_attention_is_computed_twice_and_not_three_times(
    name, latents, keys, pieces, compiled, monkeypatch
):
    """What it found is kept when a block is computed again, and all is the same to the bit."""
    monkeypatch.setattr(branches, "PIECE_TOKENS", 64)
    counts = _plain_attention(monkeypatch)
    case, found = Case(name, latents=latents), []
    for kept_keys, times in ((keys + 1, 3), (keys, 2)):
        monkeypatch.setattr(attended, "KEPT_KEYS", kept_keys)
        torch.compiler.reset()
        model = build(case)
        init_weights(model, seed=0, write=write_shaken)
        if compiled:
            all_branches = (b for block in model.blocks for b in branches.branches_of(block))
            compile_blocks(all_branches, backend="aot_eager")
        checkpoint_blocks(model.blocks, "nested", offload=True)
        for _ in range(2):  # what is kept of one step is none of the next's
            counts.clear()
            model.zero_grad()
            with kernels_as(_ALONG_SPACE):
                loss = loss_of(model, case, inputs_of(case, range(BATCH)))
                loss.backward()
            assert counts == {keys: times * pieces * (1 if name == "latte" else 2)}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | gradients)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert_same((float(loss.detach()), gradients), case, tolerance=1e-5)


def test_what_attention_found_is_let_go_piece_by_piece(monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 64)
    monkeypatch.setattr(attended, "KEPT_KEYS", 9)
    _plain_attention(monkeypatch)
    case, kept, alive = Case("stdit", depth=1), [], []
    plainly = flash_attention.launch_forward, flash_attention.launch_backward

    def launch_forward(qkv_BN3AE):
        found = plainly[0](qkv_BN3AE)
        kept.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in found)
        return found

    def launch_backward(*args):
        alive.append(sum(not storage.expired() for storage in kept))
        return plainly[1](*args)

    monkeypatch.setattr(flash_attention, "launch_forward", launch_forward)
    monkeypatch.setattr(flash_attention, "launch_backward", launch_backward)
    model = checkpointed(case, "nested", dtype=torch.float32)
    with kernels_as(_ALONG_SPACE):
        loss = loss_of(model, case, inputs_of(case, range(BATCH)))
        assert len(kept) == 6, "of three pieces, output and log-sum-exp"
        assert all(storage.expired() for storage in kept)
        loss.backward()
    assert alive == [6, 4, 2]
    assert all(storage.expired() for storage in kept), "and loss is there still"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nested_and_offloaded_is_the_same_in_less_memory(monkeypatch):
    monkeypatch.setattr(branches, "PIECE_TOKENS", 2**12)
    case, device = Case("stdit", latents=(16, 64, 64), depth=6), torch.device("cuda")
    peaks, found = [], []
    for policy, offload in (("none", False), ("nested", False), ("nested", True)):
        model = checkpointed(case, policy, offload=offload, dtype=torch.float32).to(device)
        inputs = to_device(inputs_of(case, range(BATCH)), device)
        for _ in range(2):  # memory that comes back used
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            loss_of(model, case, inputs).backward()
        peaks.append(torch.cuda.max_memory_allocated())
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for gradients in found[1:]:
        for name, gradient in found[0].items():
            error = (gradients[name] - gradient).norm() / gradient.norm()
            assert error < 1e-4, f"{name}: {error:.2g}"
    assert peaks[0] > 1.5 * peaks[1]
    # Of six inputs three are elsewhere at the turn.
    stream_bytes = BATCH * 16 * 32 * 32 * SIZES["hidden_size"] * 4
    assert peaks[2] <= peaks[1] - 2 * stream_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_attention_by_cudnn_is_computed_twice(monkeypatch):
    case, device = Case("stdit", latents=(6, 64, 64), num_heads=1), torch.device("cuda")
    monkeypatch.setattr(branches, "PIECE_TOKENS", BATCH * 2048)  # two frames
    attend, counts, found = cudnn_attention.cudnn_attend, Counter(), []

    def counted(q_BNAE, k_BNAE, v_BNAE):
        counts[q_BNAE.shape[1]] += 1
        return attend(q_BNAE, k_BNAE, v_BNAE)

    monkeypatch.setattr(cudnn_attention, "cudnn_attend", counted)
    for kept_keys, times in ((1025, 3), (1024, 2)):
        monkeypatch.setattr(attended, "KEPT_KEYS", kept_keys)
        torch.compiler.reset()
        model = build(case).to(device, torch.bfloat16)
        init_weights(model, seed=0, write=write_shaken)
        compile_blocks(b for block in model.blocks for b in branches.branches_of(block))
        checkpoint_blocks(model.blocks, "nested")
        inputs = to_device(inputs_of(case, range(BATCH), dtype=torch.bfloat16), device)
        with kernels_as(KernelConfig(self_attention="cudnn")):
            for _ in range(2):
                counts.clear()
                model.zero_grad()
                loss = loss_of(model, case, inputs)
                loss.backward()
                assert counts == {1024: times * 3 * 2}, "a piece of a block"
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach()} | gradients)
    for name, tensor in found[0].items():
        # Gradients of queries are summed in no fixed order, and then rounded to bf16.
        error = (found[1][name] - tensor).float().norm() / tensor.float().norm()
        assert error < 0.02, f"{name}: {error:.2g}"
