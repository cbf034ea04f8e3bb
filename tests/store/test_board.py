"""Lists of work: each is given out once, own ones first, and what others do is noticed."""

import numpy as np
import torch

from longtake.store.board import Board, Tally
from longtake.store.plan import WorkList
from longtake.store.shards import KEY_DTYPE, Failure, Record, shards_folder


def _lists(count):
    return [
        WorkList(
            kind="text",
            name=f"{number:016x}",
            bucket=0,
            sample_ids=np.array([number]),
            missing=np.ones((1, 1), bool),
            keys=np.array([[f"key {number:012}"]], KEY_DTYPE),
        )
        for number in range(count)
    ]


def _board(tmp_path, work, **share):
    shards_folder(tmp_path).mkdir(exist_ok=True)
    tally = Tally(total=sum(item.num_items for item in work))
    return Board(tmp_path, work, tally, **share), tally


def _finish(board, item):
    record = Record(bytes(item.keys[0, 0]), [("text", torch.ones(2, 3).bfloat16())])
    board.count(1)
    board.finish(item, [record], [], {})


def test_a_process_takes_its_own_share_first(tmp_path):
    work = _lists(7)
    board, _ = _board(tmp_path, work, share=1, shares=3)
    assert [int(item.name, 16) for item in board.open.values()] == [1, 4, 2, 5, 0, 3, 6]


def test_what_others_did_is_struck_off_and_counted(tmp_path):
    work = _lists(4)
    mine, tally = _board(tmp_path, work)
    other, other_tally = _board(tmp_path, work, share=1, shares=2)
    seen = []
    tally.on_change = lambda tally: seen.append((tally.done, tally.elsewhere))
    offers = mine.offer()
    _finish(mine, next(offers))
    others = other.offer()
    _finish(other, next(others))
    _finish(other, next(others))
    assert [int(item.name, 16) for item in mine.open.values()] == [1, 2, 3]
    _finish(mine, next(offers))
    assert (tally.done, tally.elsewhere, len(mine.open)) == (2, 2, 0)
    assert list(offers) == list(mine.offer()) == []
    assert list(others) == []
    assert (other_tally.done, other_tally.elsewhere) == (2, 2)
    size = sum(path.stat().st_size for path in shards_folder(tmp_path).iterdir())
    assert tally.bytes_written == other_tally.bytes_written == size
    assert seen[-1] == (2, 2)


def test_failures_are_counted_by_reason(tmp_path):
    work = _lists(2)
    board, tally = _board(tmp_path, work)
    for item in board.offer():
        failures = [Failure(bytes(item.keys[0, 0]), "too_short", "one frame")]
        board.count(0, failures)
        board.finish(item, [], failures, {})
    assert tally.done == 2
    assert tally.reasons == {"too_short": 2}
