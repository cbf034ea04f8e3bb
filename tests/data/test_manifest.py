from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from longtake.data import MediaError, read_manifest
from longtake.data.manifest import ManifestError, TextTable

ROWS = [
    {"path": "a.mp4", "caption": 'A "quoted", long\nsunset', "label": 3, "start": 0.5, "end": 2.5},
    {"path": "sub/b.png", "caption": "naïve 東京 🎬", "label": None, "start": None, "end": None},
]
CSV = (
    "path,caption,label,start,end\n"
    '"a.mp4","A ""quoted"", long\nsunset",3,0.5,2.5\n'
    "\n"
    "sub/b.png,naïve 東京 🎬,,,\n"
)


def as_rows(path: Path) -> list[tuple[object, ...]]:
    manifest = read_manifest(path)
    samples = [manifest[i] for i in range(len(manifest))]
    return [(s.path, s.caption, s.label, s.start, s.end) for s in samples]


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(CSV)
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "m.parquet")
    expected = [
        ("a.mp4", 'A "quoted", long\nsunset', 3, 0.5, 2.5),
        ("sub/b.png", "naïve 東京 🎬", -1, 0.0, None),
    ]
    assert as_rows(tmp_path / "m.csv") == expected
    assert as_rows(tmp_path / "m.jsonl") == expected
    assert as_rows(tmp_path / "m.parquet") == expected


def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,caption\r\na.mp4,one\r\n\r\nb.mp4,two\r\n")
    manifest = read_manifest(path)
    assert [manifest[i].caption for i in range(2)] == ["one", "two"]
    assert manifest[1].line == 4
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"path": "a.mp4"}\r\n')
    assert read_manifest(path)[0].path == "a.mp4"


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,text,clip_score\na.mp4,hello,0.3\n")
    manifest = read_manifest(tmp_path / "m.csv")
    assert manifest.ignored_columns == ("text", "clip_score")
    assert manifest[0].caption == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.csv",
            "file,caption\na,b\n",
            "line 1: no column 'path', only 'file', 'caption'; known:",
        ),
        ("m.csv", "path,path\na,b\n", "column 'path' appears more than once"),
        ("m.csv", "path,caption\na.mp4,x,y\n", "line 2: 3 cells where the header has 2"),
        ("m.csv", "path,label\na.mp4,cat\n", "line 2: label='cat' is not an integer: number the"),
        ("m.csv", "path,start\na.mp4,-1\n", "line 2: start='-1' must lie between 0 and"),
        ("m.csv", "path,start\na.mp4,nan\n", "line 2: start='nan' must lie between"),
        ("m.csv", "path,start,end\na.mp4,2,1\n", "line 2: end=1 is not after start=2"),
        ("m.csv", "path,fps\na.mp4,0\n", "fps=0 must be above 0"),
        ("m.csv", 'path\n"a.mp4\n', "not valid CSV"),
        ("m.csv", "", "the file is empty"),
        ("m.csv", "path\n\n\n", "no samples"),
        ("m.csv", "path\n../a.mp4\n", "line 2: the path '../a.mp4' leaves the root folder"),
        ("m.csv", "path\n/etc/passwd\n", "leaves the root folder: make it relative, set root="),
        ("m.csv", "path,caption\n,x\n", "line 2: the path is empty"),
        ("m.csv", "path\na\\b.mp4\n", "has a backslash: use forward slashes"),
        ("m.jsonl", '{"path": "a\\u0000b"}\n', r"control or unprintable"),
        ("m.jsonl", '{"path": "a\\u001b[31m"}\n', r"control or unprintable"),
        ("m.jsonl", '{"path": "a.mp4", "caption": "\\ud800"}\n', "lone surrogate"),
        ("m.jsonl", '{"path": 3}\n', "line 1: path=3 is not text"),
        ("m.jsonl", '{"path": "a"}\n{"path" "b"}\n', "line 2: not valid JSON"),
        ("m.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("m.jsonl", '["a.mp4"]\n', "line 1: a JSON list where an object was expected"),
        ("m.jsonl", '{"file": "a.mp4"}\n', "line 1: no key 'path', only 'file'"),
        ("m.jsonl", '{"path": "a", "label": true}\n', "label=True is not an integer"),
        ("m.jsonl", '{"path": "a", "label": 1.5}\n', "label=1.5 is not an integer"),
        ("m.jsonl", '{"path": "a", "end": [1]}\n', r"end=\[1\] is not a number"),
        ("m.jsonl", '{"path": "' + "a" * (1 << 20) + '"}\n', "line 1: longer than 1048576 bytes"),
        ("m.jsonl", '{"path": "' + "a" * 5000 + '"}\n', "5000 characters long"),
        ("m.parquet", "not parquet", "not a valid Parquet file"),
        ("m.txt", "a.mp4\n", r"must end in one of \.csv, \.jsonl, \.parquet"),
    ],
)
def test_mistakes_are_named_with_their_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_damaged_parquet_raises_nothing_else(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 20), tmp_path / "good.parquet")
    good = np.frombuffer((tmp_path / "good.parquet").read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(100):
        damaged = good.copy()
        damaged[generator.integers(0, len(good), 4)] = generator.integers(0, 256, 4)
        (tmp_path / "m.parquet").write_bytes(damaged.tobytes())
        with contextlib.suppress(ManifestError):
            read_manifest(tmp_path / "m.parquet")


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("path,caption\na.mp4,café\n".encode("latin-1"))
    with pytest.raises(ManifestError, match="line 2: not UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_a_manifest_that_is_no_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="not a regular file"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "absent.csv")


def test_paths_stay_in_the_root_unless_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"x")
    (inside / "link.mp4").symlink_to(outside / "secret.mp4")
    (inside / "loop.mp4").symlink_to(inside / "loop.mp4")
    (inside / "m.csv").write_text("path\nlink.mp4\nloop.mp4\n")
    manifest = read_manifest(inside / "m.csv")
    with pytest.raises(MediaError, match="outside the root folder") as caught:
        manifest.real_path(manifest[0])
    assert caught.value.reason == "outside_root"
    with pytest.raises(MediaError):
        manifest.real_path(manifest[1])
    allowed = read_manifest(inside / "m.csv", allow_outside_root=True)
    assert allowed.real_path(allowed[0]) == (outside / "secret.mp4").resolve()
    (inside / "up.csv").write_text("path\n../out/secret.mp4\n")
    allowed = read_manifest(inside / "up.csv", allow_outside_root=True)
    assert allowed.real_path(allowed[0]).read_bytes() == b"x"
    rooted = read_manifest(inside / "m.csv", root=outside)
    assert rooted.real_path(rooted[0]).parent == outside.resolve()


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is a folder: give a manifest\. A latent store is"):
        read_manifest(tmp_path)


def test_a_text_table_is_a_list_of_strings() -> None:
    table = TextTable()
    texts = ["", "a", "東京", "", "🎬 end"]
    for text in texts:
        table.append(text)
    assert list(table) == texts
    assert table[-1] == texts[-1]
    assert table[1:4] == texts[1:4]
    with pytest.raises(IndexError):
        table[5]
    assert list(TextTable.from_columns(*table.columns())) == texts
    assert list(TextTable.from_columns(*TextTable().columns())) == []
