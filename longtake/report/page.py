"""`report.html`: one self-contained page with a run's curve, its clips, and what really ran."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from longtake.report.plot import plot_loss, read_metrics, series

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.soft { color: var(--soft); } .warning { border-left: 4px solid #c0392b; padding: .4rem 1rem; }
img.curve { width: 100%; background: white; border-radius: 6px; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
.figures b { display: block; font-size: 1.5rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.clips figure { margin: 0; }
.clips video, .clips img { width: 100%; border-radius: 6px; }
.clips figcaption { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
pre { padding: .8rem; font-size: .8rem; }
"""
_MIME = {".mp4": "video/mp4", ".png": "image/png"}


def write_report(folder: Path) -> Path:
    """Write `loss.png` and `report.html` from what a run's folder holds; the page's path."""
    records = read_metrics(folder / "metrics.jsonl")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    plot_loss(records, folder / "loss.png")
    page = folder / "report.html"
    page.write_text(_page(folder, records, record, config), encoding="utf-8")
    return page


def _page(folder: Path, records: list[dict[str, Any]], record: dict[str, Any], config: str) -> str:
    name = html.escape(folder.name)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{name} · Longtake</title><style>{_STYLE}</style></head><body>",
        f"<h1>{name}</h1><p class='soft'>{html.escape(_subtitle(record))}</p>",
        _warning(record),
        _figures(records, record),
        "<h2>Loss</h2>",
        f"<img class='curve' alt='Loss against step' src='{_data_uri(folder / 'loss.png')}'>",
        _clips("Sampled clips", _latest_samples(folder), folder),
        _clips("Real clips it was trained on", sorted((folder / "real").glob("*.mp4")), folder),
        f"<h2>What ran</h2><pre>{html.escape(json.dumps(record, indent=2))}</pre>",
        f"<h2>Configuration</h2><pre>{html.escape(config)}</pre></body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _subtitle(record: dict[str, Any]) -> str:
    model = record["model"]
    device = record["environment"]["device"]
    where = device.get("name") or f"CPU, {device['threads']} threads"
    return (
        f"{model['name']} · {model['parameters'] / 1e6:,.1f} M parameters · {where} · "
        f"{record['environment']['started']}"
    )


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
    figures = [("steps", f"{record.get('steps_done', 0):,}")]
    if held_out:
        change = f"{held_out[0]:.3f} → {held_out[-1]:.3f}"
        figures.append((f"held-out loss ({held_out[-1] / held_out[0] - 1:+.0%})", change))
    for label, values in (("samples/s", samples), ("tokens/s", tokens)):
        if values:
            figures.append((f"{label}, median", f"{sorted(values)[len(values) // 2]:,.1f}"))
    cells = "".join(
        f"<div><b>{html.escape(value)}</b><span class='soft'>{html.escape(label)}</span></div>"
        for label, value in figures
    )
    return f"<div class='figures'>{cells}</div>"


def _latest_samples(folder: Path) -> list[Path]:
    steps = sorted((folder / "samples").glob("step-*"))
    if not steps:
        return []
    return sorted(path for path in steps[-1].iterdir() if path.suffix in _MIME)


def _clips(title: str, paths: list[Path], folder: Path) -> str:
    if not paths:
        return ""
    captions = {}
    figures = []
    for path in paths:
        if path.parent not in captions:
            listing = path.parent / "captions.json"
            captions[path.parent] = json.loads(listing.read_text()) if listing.exists() else {}
        caption = html.escape(captions[path.parent].get(path.name, path.stem))
        uri = _data_uri(path)
        if path.suffix == ".mp4":
            media = f"<video autoplay loop muted playsinline controls src='{uri}'></video>"
        else:
            media = f"<img alt='{caption}' src='{uri}'>"
        figures.append(f"<figure>{media}<figcaption>{caption}</figcaption></figure>")
    where = html.escape(str(paths[0].parent.relative_to(folder)))
    return f"<h2>{title}</h2><p class='soft'>{where}</p><div class='clips'>{''.join(figures)}</div>"


def _data_uri(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{_MIME[path.suffix]};base64,{data}"
