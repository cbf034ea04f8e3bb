"""`report.html`: one self-contained page with a run's curve, its clips, and what really ran."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from longtake.report.plot import plot_loss, series
from longtake.training import read_metrics

# Colours follow the reader's light or dark setting; nothing is fetched from anywhere.
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #66707a; --line: #dfe3e8; --page: #fff;
  --card: #f5f7f9; --good: #1f7a4d; --bad: #b3372b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a2ac; --line: #333b43;
  --page: #14181c; --card: #1c2228; --good: #63c294; --bad: #ef8578; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; } h1 + p { margin-top: .2rem; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.2rem; }
.soft { color: var(--soft); }
.warning { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.4rem 0; }
.figures div, .curve, figure, pre { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.figures div { padding: .7rem .9rem; }
.figures b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.figures span { font-size: .85rem; color: var(--soft); }
.figures .good b { color: var(--good); } .figures .bad b { color: var(--bad); }
.curve { width: 100%; display: block; padding: .6rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
.clips .pair { grid-column: span 2; }
figure { margin: 0; overflow: hidden; }
.media { display: flex; gap: 1px; background: var(--line); }
.media div { flex: 1; min-width: 0; position: relative; }
.media i { position: absolute; left: .5rem; top: .5rem; padding: 0 .5rem; border-radius: 4px;
  font: .75rem/1.5 system-ui, sans-serif; color: #fff; background: #000a; }
video, .media img { display: block; width: 100%; height: auto; }
figcaption { padding: .5rem .8rem .6rem; font-size: .9rem; overflow-wrap: anywhere; }
details { margin-top: .8rem; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: .8rem; font-size: .8rem; line-height: 1.45; }
@media (max-width: 34rem) { .clips .pair { grid-column: auto; } }
"""
_MIME = {".mp4": "video/mp4", ".png": "image/png"}


def write_report(folder: Path) -> Path:
    """Write `loss.png` and `report.html` from what a run's folder holds; the page's path."""
    records = read_metrics(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    plot_loss(records, folder / "loss.png")
    page = folder / "report.html"
    page.write_text(_page(folder, records, record, config), encoding="utf-8")
    return page


def _page(folder: Path, records: list[dict[str, Any]], record: dict[str, Any], config: str) -> str:
    name = html.escape(folder.name)
    what = html.escape(json.dumps(record, indent=2, ensure_ascii=False))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{name} · Longtake</title><style>{_STYLE}</style></head><body>",
        f"<h1>{name}</h1><p class='soft'>{html.escape(_subtitle(record))}</p>",
        _warning(record),
        _figures(records, record),
        _clips(folder),
        "<h2>Loss</h2>",
        f"<img class='curve' alt='Loss against step' src='{_data_uri(folder / 'loss.png')}'>",
        "<h2>Details</h2>",
        f"<details><summary>What ran</summary><pre>{what}</pre></details>",
        f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _subtitle(record: dict[str, Any]) -> str:
    model = record["model"]
    device = record["environment"]["device"]
    threads = device.get("threads")
    where = device.get("name") or f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    started = record["environment"]["started"].replace("T", " ").replace("Z", " UTC")
    return f"{model['name']} · {model['parameters'] / 1e6:,.1f} M parameters · {where} · {started}"


def _warning(record: dict[str, Any]) -> str:
    if not record["encoders"]["random"]:
        return ""
    return (
        "<p class='warning'>The encoders of this run have random weights: it measures speed and "
        "memory. Its samples mean nothing.</p>"
    )


def _figures(records: list[dict[str, Any]], record: dict[str, Any]) -> str:
    _, held_out = series(records, "validation/loss")
    _, samples = series(records, "speed/samples_per_second")
    _, tokens = series(records, "speed/tokens_per_second")
    figures = []  # (mark, value, what it is)
    if len(held_out) > 1:
        change = held_out[-1] / held_out[0] - 1
        mark = "good" if change < 0 else "bad"
        figures.append(("", f"{held_out[0]:.2f} → {held_out[-1]:.2f}", "held-out loss"))
        figures.append((mark, f"{change:+.0%}".replace("-", "−"), "held-out loss, change"))
    figures.append(("", f"{record.get('steps_done', 0):,}", "steps"))
    for label, values, digits in (("samples/s", samples, 1), ("tokens/s", tokens, 0)):
        if values:
            median = sorted(values)[len(values) // 2]
            figures.append(("", f"{median:,.{digits}f}", f"{label}, median"))
    cells = "".join(
        f"<div class='{mark}'><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"
        for mark, value, label in figures
    )
    return f"<div class='figures'>{cells}</div>"


def _clips(folder: Path) -> str:
    """The newest samples, each beside a real clip of the same caption if there is one; then the
    other real clips."""
    steps = sorted((folder / "samples").glob("step-*"))
    samples = _captioned(steps[-1]) if steps else []
    real = _captioned(folder / "real")
    sampled, paired = [], set()
    for path, caption in samples:
        match = next((other for other, text in real if text == caption), None)
        if match is None:
            sampled.append(_figure([("sampled", path)], caption))
        else:
            paired.add(match)
            sampled.append(_figure([("sampled", path), ("real", match)], caption))
    others = [_figure([("real", path)], text) for path, text in real if path not in paired]
    parts = []
    if sampled:
        where = html.escape(steps[-1].relative_to(folder).as_posix())
        beside = ", beside real clips it was trained on" if paired else ""
        parts.append(f"<h2>What it samples{beside}</h2><p class='soft'>{where}</p>")
        parts.append(f"<div class='clips'>{''.join(sampled)}</div>")
    if others:
        parts.append("<h2>Real clips it was trained on</h2>")
        parts.append(f"<div class='clips'>{''.join(others)}</div>")
    return "\n".join(parts)


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """The clips of a folder with their captions, file names where those are missing."""
    listing = folder / "captions.json"
    captions = json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else {}
    paths = sorted(path for path in folder.glob("*") if path.suffix in _MIME)
    return [(path, captions.get(path.name) or path.stem) for path in paths]


def _figure(media: list[tuple[str, Path]], caption: str) -> str:
    text = html.escape(caption)
    cells = "".join(
        f"<div>{_element(path, f'{kind}: {text}')}<i>{kind}</i></div>" for kind, path in media
    )
    wide = " class='pair'" if len(media) > 1 else ""
    return (
        f"<figure{wide}><div class='media'>{cells}</div><figcaption>{text}</figcaption></figure>\n"
    )


def _element(path: Path, escaped_text: str) -> str:
    uri = _data_uri(path)
    if path.suffix == ".png":
        return f"<img alt='{escaped_text}' src='{uri}'>"
    return (
        f"<video autoplay loop muted playsinline aria-label='{escaped_text}' src='{uri}'></video>"
    )


def _data_uri(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{_MIME[path.suffix]};base64,{data}"
