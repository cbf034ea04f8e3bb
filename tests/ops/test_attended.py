"""What attention found is given back once, in its order, and to nobody else."""

from __future__ import annotations

import threading

import pytest
import torch

from longtake.ops import attended
from longtake.ops.attended import giving_attended, keeping_attended, keeps_attended


@keeps_attended
def _attend(qkv_BN3AE):
    _attend.calls += 1
    return qkv_BN3AE[:, :, 0] + _attend.calls, qkv_BN3AE[:, :, 1, :, 0].transpose(1, 2).float()


@pytest.fixture(autouse=True)
def _of_four_keys(monkeypatch):
    monkeypatch.setattr(attended, "KEPT_KEYS", 4)
    monkeypatch.setattr(_attend, "calls", 0, raising=False)


def _qkv(keys: int, dtype=torch.float32) -> torch.Tensor:
    return torch.arange(keys * 12, dtype=dtype).view(1, keys, 3, 2, 2)


def test_what_was_kept_is_given_back_in_its_order():
    kept, inputs = [], [_qkv(4), _qkv(3), _qkv(5), _qkv(5)]
    with keeping_attended(kept):
        found = [_attend(qkv) for qkv in inputs]
    assert len(kept) == 6, "nothing of three keys"
    with giving_attended(kept):
        again = [_attend(qkv) for qkv in inputs]
    assert not kept
    assert _attend.calls == 5, "once more that of three keys alone"
    for index in (0, 2, 3):
        assert all(map(torch.equal, found[index], again[index]))


def test_without_a_context_nothing_is_kept_or_given():
    with keeping_attended(kept := []):
        _attend(_qkv(4))
    _attend(_qkv(4))
    assert (len(kept), _attend.calls) == (2, 2)


def test_other_threads_compute_for_themselves():
    with keeping_attended(kept := []):
        thread = threading.Thread(target=_attend, args=(_qkv(4),))
        thread.start()
        thread.join()
    assert _attend.calls == 1
    assert not kept


def test_what_differs_from_what_was_kept_is_refused():
    with keeping_attended(kept := []):
        _attend(_qkv(5))
    with giving_attended(list(kept)), pytest.raises(RuntimeError, match=r"\(1, 4, 2, 2\).*kept is"):
        _attend(_qkv(4))
    with giving_attended(list(kept)), pytest.raises(RuntimeError, match=r"float64, but kept"):
        _attend(_qkv(5, torch.float64))
    with giving_attended([]), pytest.raises(RuntimeError, match=r"5 keys .* nothing of it is kept"):
        _attend(_qkv(5))
