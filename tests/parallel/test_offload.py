"""Inputs of blocks wait in host memory: gone from the device as soon as they can be, there again
when they are needed, and the same."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from longtake.parallel import ParallelConfig, offload
from longtake.parallel.offload import StreamOffload
from tests.parallel.sequence_cases import (
    BATCH,
    Case,
    assert_same,
    checkpointed,
    inputs_of,
    loss_of,
)


def _note_inputs(model) -> list[StorageWeakRef]:
    """Of each block's input, as it runs forward first."""
    noted = []

    def note(block, args):
        noted.append(StorageWeakRef(args[0].untyped_storage()))

    for block in model.blocks:
        block.register_forward_pre_hook(note)
    return noted


@pytest.mark.parametrize(
    ("policy", "offload", "kept"),
    # Offloaded: the newest, the one that leaves; or the last, where they stay.
    [
        ("full", {}, 6),
        ("nested", {}, 6),
        ("full", {"offload": True}, 2),
        ("nested", {"offload": True}, 2),
        ("full", {"offload": True, "kept_inputs": 1}, 2),
        ("nested", {"offload": True, "kept_inputs": 4}, 4),
        ("full", {"offload": True, "kept_inputs": 3, "kept_blocks": 1}, 4),
        ("full", {"offload": True, "kept_inputs": 9}, 6),
    ],
)
@pytest.mark.parametrize("name", ["stdit", "latte"])
def test_inputs_of_blocks_are_there_as_long_as_they_must_be(name, policy, offload, kept):
    case = Case(name, depth=6)
    model = checkpointed(case, policy, **offload)
    noted = _note_inputs(model)
    loss = loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64))
    assert sum(not storage.expired() for storage in noted) == kept
    loss.backward()
    assert sum(not storage.expired() for storage in noted) == 0, "and loss is there still"
    if offload:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_same((float(loss.detach()), gradients), case, tolerance=1e-12, dtype=torch.float64)


class _Square(torch.autograd.Function):
    """Keeps its input, as a checkpointed block does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return 2 * x * dout


@pytest.mark.parametrize(
    ("kept", "sent"),
    [
        ({}, 5),
        ({"kept_inputs": 1}, 5),
        ({"kept_inputs": 4}, 2),
        ({"kept_inputs": 3, "kept_blocks": 1}, 2),
    ],
)
def test_so_many_inputs_go_to_the_host(kept, sent, monkeypatch):
    copied, send = [], offload._Input._send

    def noted(self):
        send(self)
        copied.append(sum(piece.numel() for piece in self._host))

    monkeypatch.setattr(offload._Input, "_send", noted)
    case = Case("stdit", depth=6)
    model = checkpointed(case, "full", offload=True, **kept)
    loss_of(model, case, inputs_of(case, range(BATCH), dtype=torch.float64)).backward()
    assert sum(copied) == sent * max(copied)


def test_offloaded_inputs_leave_the_device_and_come_back_as_they_were():
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second forward begins anew, whatever became of the first
        offload = StreamOffload()
        out = x + 0
        for number in range(6):
            out = offload.around(_Square.apply, is_first=number == 0)(out)
    on_device, kept = 0, offload._newest
    while kept is not None:
        on_device += kept._x is not None
        kept = kept._before
    assert on_device == 2, "the newest, and the one on its way"
    out.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 64 * x**63, rtol=1e-12)


def test_offload_without_checkpointed_blocks_is_refused():
    with pytest.raises(ValueError, match=r"checkpointing=selective .* full or nested"):
        ParallelConfig(offload=True)


def test_inputs_stay_only_where_others_leave():
    with pytest.raises(ValueError, match=r"kept_inputs=2 with parallel.offload=False"):
        ParallelConfig(checkpointing="nested", kept_inputs=2)
    with pytest.raises(ValueError, match=r"kept_inputs=-1"):
        ParallelConfig(checkpointing="nested", offload=True, kept_inputs=-1)
