"""What encoding costs: seconds and bytes per clip of each bucket and per caption, measured with the
encoders that fill the store and kept beside it, so that all processes and later runs agree.

Letters: B samples, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from longtake.data import Manifest
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.store.claims import wait_for_claim
from longtake.store.forms import record_bytes
from longtake.store.index import checksum_of, replace_file
from longtake.store.plan import Content, Group
from longtake.store.recipe import Recipe
from longtake.store.tensor_file import StoreError, open_file
from longtake.store.writer import CAPTIONS_PER_CALL, clips_per_call

FILE = "rates.json"
_MAX_BYTES = 2**20
_TIMED_CALLS = 2


@dataclass(frozen=True)
class Rate:
    """Of one clip or caption."""

    seconds: float
    """Of its encoder, which took as many at once as it does when it fills a store."""
    num_bytes: float
    """On average, without what a header says of it."""


Rates = Mapping[Group, Rate]


def agreed_rates(
    store: Path, recipe: Recipe, measure: Callable[[], Rates], *, is_kept: bool = True
) -> Rates:
    """The rates that the store's folder has, or else measured ones, which it has from then on.

    Whoever comes while another process measures waits for it.
    """
    if not is_kept:
        return _read_if_any(store, recipe) or measure()
    with wait_for_claim(store, "rates"):
        rates = _read_if_any(store, recipe)
        if rates is None:
            rates = measure()
            names = _names(recipe)
            body = {names[group]: asdict(rate) for group, rate in rates.items()}
            document = {"crc32": checksum_of(body), "rates": body}
            replace_file(store / FILE, json.dumps(document, indent=1))
    return rates


def read_rates(store: Path) -> dict[str, Rate]:
    """What the folder has, by the digests of what was encoded.

    Raises:
        StoreError: the file is damaged, or missing.
    """
    path = store / FILE
    with open_file(path) as file:
        raw = file.read(_MAX_BYTES)
    try:
        document = json.loads(raw)
        body = document["rates"]
        rates = {name: Rate(**value) for name, value in body.items()}
        is_whole = document["crc32"] == checksum_of(body)
        numbers = [number for rate in rates.values() for number in (rate.seconds, rate.num_bytes)]
        is_whole &= all(type(n) in (int, float) and 0 < n < math.inf for n in numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(path, f"is damaged: it cannot be read ({error!r:.100})") from error
    if not is_whole:
        raise StoreError(path, "is damaged: it does not have the checksum it should have")
    return rates


def _read_if_any(store: Path, recipe: Recipe) -> Rates | None:
    """None unless the folder has the rates of everything in this recipe."""
    try:
        kept = read_rates(store)
    except StoreError:
        return None
    names = _names(recipe)
    if not set(names.values()) <= set(kept):
        return None
    return {group: kept[name] for group, name in names.items()}


def _names(recipe: Recipe) -> dict[Group, str]:
    """What stands for a group in the file, whatever its place in a configuration."""
    names: dict[Group, str] = {
        ("clips", bucket): f"clips-{recipe.clip_digest(bucket).hex()[:16]}"
        for bucket in range(len(recipe.buckets))
    }
    if recipe.text is not None:
        names["text", 0] = f"text-{recipe.text_digest().hex()[:16]}"
    return names


def captions_to_time(manifest: Manifest, content: Content) -> list[str]:
    """A call of the text encoder: the first different captions that the store is to hold."""
    _, first = np.unique(content.text, return_index=True)
    ids = np.sort(first[content.text[first] != b""])[:CAPTIONS_PER_CALL].tolist()
    return [manifest[sample_id].caption for sample_id in ids]


def measure_rates(
    captions: Sequence[str],
    recipe: Recipe,
    *,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
    device: torch.device,
) -> Rates:
    """Times a few calls of each encoder: of the text encoder on some captions, of the video encoder
    on noise, which costs it what pictures cost."""
    rates: dict[Group, Rate] = {}
    if text_encoder is not None:
        rates["text", 0] = _text_rate(captions, text_encoder)
    for bucket, (num_frames, height, width) in enumerate(recipe.buckets):
        count = clips_per_call(recipe, bucket)
        shape = (count, 3, num_frames, height, width)
        generator = torch.Generator().manual_seed(0)
        pixels_BCTHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        seconds, has_posterior = [], False
        for _ in range(1 + _TIMED_CALLS):
            started = time.perf_counter()
            stats = video_encoder.encode(pixels_BCTHW.to(device))
            stats.mean_BCTHW.cpu()  # waits for the device, as filling a store does
            seconds.append(time.perf_counter() - started)
            has_posterior = stats.logvar_BCTHW is not None
        size = record_bytes(
            recipe.latent_shapes[bucket], recipe.latents, with_posterior=has_posterior
        )
        rates["clips", bucket] = Rate(min(seconds[1:]) / count, size)  # the first one warms up
    return rates


def _text_rate(captions: Sequence[str], encoder: TextEncoder) -> Rate:
    # Other ones to warm up: an encoder may remember what it has encoded.
    encoder.encode([f"{number} {caption}" for number, caption in enumerate(captions)])
    started = time.perf_counter()
    prompt = encoder.encode(captions)
    tokens = float(prompt.mask_BL.sum(dim=1).float().mean().cpu())
    seconds = time.perf_counter() - started
    return Rate(seconds / len(captions), 2 * encoder.channels * tokens)


def group_text(group: Group, recipe: Recipe) -> str:
    kind, bucket = group
    return "captions" if kind == "text" else f"clips {'x'.join(map(str, recipe.buckets[bucket]))}"
