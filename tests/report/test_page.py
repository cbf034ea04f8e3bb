"""The page of a run: everything in one file, nothing from anywhere else, nothing unescaped."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.pipeline import write_clips
from longtake.report import write_report
from longtake.report.plot import series
from longtake.training import read_metrics

CAPTION = "A <b>rabbit</b> & 'friends' \"</figcaption><script>alert(1)</script>"


class _Elements(HTMLParser):
    """All elements with their attributes, and all text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _record(**changed: Any) -> dict[str, Any]:
    environment = {"started": "2026-01-02T03:04:05Z", "device": {"type": "cpu", "threads": 2}}
    model = {"name": "stdit2-tiny", "parameters": 1_570_000}
    encoders = {"random": False}
    return {
        "environment": environment,
        "model": model,
        "encoders": encoders,
        "steps_done": 20,
    } | changed


def _run(folder: Path, *, record: dict[str, Any] | None = None, clips: bool = True) -> Path:
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {"step": 0, "validation/loss": 2.0},
        {"step": 10, "train/loss": 1.5, "speed/samples_per_second": 30.04},
        {"step": 20, "train/loss": None, "speed/samples_per_second": 30.04},
        {"step": 20, "validation/loss": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(record or _record()))
    (folder / "config.yaml").write_text("name: run\nprompt: <i>&</i>\n")
    if clips:
        videos_BCTHW = torch.randint(0, 256, (2, 3, 4, 16, 32), dtype=torch.uint8)
        write_clips(folder / "samples" / "step-00000010", videos_BCTHW, ["old", "older"], fps=8)
        write_clips(folder / "samples" / "step-00000020", videos_BCTHW, [CAPTION, "alone"], fps=8)
        write_clips(folder / "real", videos_BCTHW, ["another real one", CAPTION], fps=8)
    return folder


def _page(folder: Path) -> _Elements:
    parsed = _Elements()
    parsed.feed(write_report(folder).read_text(encoding="utf-8"))
    return parsed


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = _page(_run(tmp_path / "run"))
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "poster", "srcset", "data", "action")
    ]
    assert len(addresses) == 5, "the curve, two sampled clips and two real ones"
    assert all(address and address.startswith("data:") for address in addresses)
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "http:" not in source
    assert "https:" not in source
    assert "@import" not in source
    assert "url(" not in source
    assert not page.all("script")


def test_the_newest_samples_stand_beside_real_clips_of_the_same_caption(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    page = _page(folder)
    labels = [str(attributes["aria-label"]) for attributes in page.all("video")]
    assert labels == [
        f"sampled: {CAPTION}",
        f"real: {CAPTION}",
        "sampled: alone",
        "real: another real one",
    ]
    real = base64.b64decode(str(page.all("video")[1]["src"]).partition(",")[2])
    assert real == (folder / "real" / "001.mp4").read_bytes()
    assert "older" not in page.text


def test_whatever_people_wrote_is_shown_as_they_wrote_it(tmp_path: Path) -> None:
    page = _page(_run(tmp_path / "a <b> run"))
    assert CAPTION in page.text
    assert "prompt: <i>&</i>" in page.text
    assert "a <b> run" in page.text
    assert not page.all("script")


def test_the_figures_say_from_where_to_where_the_held_out_loss_went(tmp_path: Path) -> None:
    page = _page(_run(tmp_path / "run"))
    assert "2.00 → 0.50" in page.text
    assert "−75%" in page.text
    assert "30.0samples/s" in page.text


def test_a_run_without_clips_or_held_out_samples_has_a_page_too(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", clips=False)
    (folder / "metrics.jsonl").write_text("")
    page = _page(folder)
    assert not page.all("video")
    assert "held-out" not in page.text


def test_a_run_with_random_encoders_says_so(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", record=_record(encoders={"random": True}))
    assert "random weights" in _page(folder).text


@pytest.mark.parametrize("tail", ['{"step": 30, "tra', '{"step": 30', "\x00\x00\x00"])
def test_a_half_written_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    folder = _run(tmp_path / "run", clips=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(tail)
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [0, 10, 20, 20]
    assert series(records, "train/loss") == ([10], [1.5]), "a value that was not finite is no point"
    write_report(folder)
