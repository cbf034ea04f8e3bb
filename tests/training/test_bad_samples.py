import json

from longtake.training import BadSampleLog

A = {"path": "a.mp4", "line": 2, "text": "is empty"}
B = {"path": "b\u2028ö.mp4", "line": 3, "text": "has no frames"}


def _entries(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_each_sample_is_written_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    log = BadSampleLog(path, is_writer=True)
    assert log.note(1, tmp_path / "m.csv", []) == 0
    assert not path.exists()
    assert log.note(2, tmp_path / "m.csv", [A]) == 1
    assert log.note(5, tmp_path / "m.csv", [A, B]) == 2
    assert [(entry["step"], entry["path"]) for entry in _entries(path)] == [
        (2, "a.mp4"),
        (5, B["path"]),
    ]
    # The same line of another manifest is another sample.
    assert log.note(6, tmp_path / "held-out.csv", [A]) == 3


def test_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "bad.jsonl"
    first = BadSampleLog(path, is_writer=True)
    first.note(0, tmp_path / "m.csv", [B])
    first.note(5, tmp_path / "m.csv", [A])
    with path.open("a") as file:
        file.write('{"step": 5, "cut')
    resumed = BadSampleLog(path, is_writer=True, first_step=4)
    assert [entry["line"] for entry in _entries(path)] == [3]
    assert resumed.note(6, tmp_path / "m.csv", [A, B]) == 2
    assert [entry["step"] for entry in _entries(path)] == [0, 6]


def test_fresh_run_begins_with_an_empty_list(tmp_path):
    path = tmp_path / "bad.jsonl"
    BadSampleLog(path, is_writer=True).note(5, tmp_path / "m.csv", [A])
    BadSampleLog(path, is_writer=False)
    assert len(_entries(path)) == 1
    BadSampleLog(path, is_writer=True)
    assert _entries(path) == []
