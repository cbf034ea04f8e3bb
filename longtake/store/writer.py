"""Encoding what a store lacks, shard by shard.

A list of work is read, encoded and written by one process; another may have the next. Kill it at
any moment: the shards it finished are whole, and the one in flight is done again. What becomes of a
list is a function of the list alone (same clips in the same calls of the encoder), so it comes out
the same.

Letters: B samples, C channels, T frames, H W height and width, L tokens, K their width.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.data import (
    Bucket,
    DataConfig,
    LoaderError,
    Manifest,
    MediaError,
    MediaSource,
    View,
)
from longtake.data.reader import Reader
from longtake.data.source import position_of
from longtake.data.transforms import mirror
from longtake.data.workers import run_workers
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.store.board import Board
from longtake.store.forms import FormError, pack
from longtake.store.plan import WorkList, raw_key
from longtake.store.recipe import Recipe
from longtake.store.shards import Failure, Record

CAPTIONS_PER_CALL = 64
# Pixels per call of the video encoder, as many as it takes at once: 16 clips of 16x256x256.
_PIXELS_PER_CALL = 2**24
_MAX_CLIPS_PER_CALL = 64
_POLL_SECONDS = 0.5
# A worker may have been killed for its neighbour's sake: its clip gets a second chance.
_MAX_CRASHES = 2


def encode_captions(
    board: Board, *, manifest: Manifest, recipe: Recipe, encoder: TextEncoder
) -> None:
    """Encodes all open lists of captions; returns when none is left, whoever did them."""
    assert recipe.text is not None
    notes = {"encoder": recipe.text.provenance}
    while board.open:
        for item in board.offer():
            records: list[Record] = []
            failures: list[Failure] = []
            ids, keys = item.sample_ids.tolist(), item.keys[:, 0].tolist()
            for begin in range(0, len(ids), CAPTIONS_PER_CALL):
                part = slice(begin, begin + CAPTIONS_PER_CALL)
                captions = [manifest[sample_id].caption for sample_id in ids[part]]
                started = time.perf_counter()
                prompt = encoder.encode(captions)
                lengths = prompt.mask_BL.sum(dim=1).tolist()
                embeds_BLK = prompt.embeds_BLK.bfloat16().cpu()
                board.time(item, len(captions), time.perf_counter() - started)
                good: list[Record] = []
                bad: list[Failure] = []
                for key, embeds_LK, length in zip(keys[part], embeds_BLK, lengths, strict=True):
                    embeds_LK = embeds_LK[:length].clone()
                    if bool(embeds_LK.isfinite().all()):
                        good.append(Record(raw_key(key), [("text", embeds_LK)]))
                    else:
                        bad.append(_not_finite(key, "caption"))
                records += good
                failures += bad
                board.count(len(good), bad)
            board.finish(item, records, failures, notes)
        if board.open:
            time.sleep(_POLL_SECONDS)


def encode_clips(
    board: Board,
    *,
    manifest: Manifest,
    recipe: Recipe,
    config: DataConfig,
    encoder: VideoEncoder,
    device: torch.device,
) -> None:
    """Encodes all open lists of clips; returns when none is left, whoever did them."""
    buckets = tuple(Bucket(num_frames=t, height=h, width=w) for t, h, w in recipe.buckets)
    config = dataclasses.replace(config, buckets=buckets)
    reader = ClipReader(config, manifest, recipe)
    jobs = _Jobs(board, recipe)
    crashes: Counter[int] = Counter()
    while True:
        requests = jobs.requests()
        first = next(requests, None)
        if first is None:
            if not board.open:
                return
            time.sleep(_POLL_SECONDS)
            continue
        try:
            chained = itertools.chain([first], requests)
            for decoded in run_workers(reader, chained, pin_memory=False):
                jobs.receive(decoded, encoder, device)
        except LoaderError as error:
            # A decoder that crashes or hangs takes its process along; the others start anew.
            guilty = jobs.blamed(error.sample_ids)
            if not guilty:
                raise
            crashes.update(guilty)
            for sample_id in guilty:
                if crashes[sample_id] >= _MAX_CRASHES:
                    reader.refused[sample_id] = str(error)[:300]


@dataclass(frozen=True)
class Job:
    """The clips of one sample that one list wants."""

    work: WorkList
    row: int

    @property
    def sample_id(self) -> int:
        return int(self.work.sample_ids[self.row])

    @property
    def variants(self) -> list[int]:
        return np.flatnonzero(self.work.missing[self.row]).tolist()


@dataclass(frozen=True)
class Request:
    """What a worker is told of a job."""

    sample_id: int
    bucket: int
    variants: list[int]


@dataclass(frozen=True)
class Decoded:
    """For each variant asked for its pixels_CTHW, uint8, or why there are none."""

    clips: list[Tensor | tuple[str, str]]


class ClipReader(Reader):
    """Decodes the clips of jobs, in whichever process it finds itself; never fails for a file."""

    def __init__(self, config: DataConfig, manifest: Manifest, recipe: Recipe) -> None:
        super().__init__(config, MediaSource(config, manifest))
        self.recipe = recipe
        self.refused: dict[int, str] = {}
        """Samples that have crashed their reader before, and how."""

    def __getitem__(self, request: Request) -> Decoded:
        at_place: dict[int, Tensor | tuple[str, str]] = {}
        clips = []
        for variant in request.variants:
            place, flip = divmod(variant, 2) if self.recipe.flips else (variant, 0)
            if place not in at_place:
                at_place[place] = self._clip(request, place)
            clip = at_place[place]
            clips.append(mirror(clip) if flip and isinstance(clip, Tensor) else clip)
        return Decoded(clips)

    def _clip(self, request: Request, place: int) -> Tensor | tuple[str, str]:
        if crash := self.refused.get(request.sample_id):
            return "unreadable", f"crashed or hung its reader: {crash}"
        view = View(position=position_of(place, self.recipe.places))
        try:
            return self.read(request.sample_id, request.bucket, view).contiguous()
        except MediaError as error:
            return error.reason, error.text


@dataclass
class _Taken:
    """A list in the making."""

    records: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: int = 0
    """Jobs not received yet."""
    error: FormError = field(default_factory=FormError)
    keys: list[bytes] = field(default_factory=list)
    """Of the clips that wait for their call of the encoder."""
    pixels: list[Tensor] = field(default_factory=list)


class _Jobs:
    """Jobs in the order in which readers return them, and the lists they belong to."""

    def __init__(self, board: Board, recipe: Recipe) -> None:
        self.board, self.recipe = board, recipe
        self.scale_C = torch.tensor(recipe.video.facts["latent_scale"])
        self.outstanding: deque[Job] = deque()
        self.taken: dict[str, _Taken] = {}

    def requests(self) -> Iterator[Request]:
        """Jobs given out and not received, again; then those of lists not taken so far."""
        for job in list(self.outstanding):
            yield self._request(job)
        for item in self.board.offer():
            self.taken[item.name] = _Taken(left=len(item.sample_ids))
            jobs = [Job(item, row) for row in range(len(item.sample_ids))]
            self.outstanding.extend(jobs)
            for job in jobs:
                yield self._request(job)

    def _request(self, job: Job) -> Request:
        return Request(job.sample_id, job.work.bucket, job.variants)

    def blamed(self, sample_ids: tuple[int, ...]) -> list[int]:
        """Those of the samples that are being waited for."""
        waiting = {job.sample_id for job in self.outstanding}
        return [sample_id for sample_id in sample_ids if sample_id in waiting]

    def receive(self, decoded: Decoded, encoder: VideoEncoder, device: torch.device) -> None:
        """Takes the next job's clips; encodes when enough wait, writes when a list is complete."""
        job = self.outstanding.popleft()
        taken = self.taken[job.work.name]
        failures = []
        for variant, clip in zip(job.variants, decoded.clips, strict=True):
            key = raw_key(job.work.keys[job.row, variant])
            if isinstance(clip, Tensor):
                taken.keys.append(key)
                taken.pixels.append(clip)
            else:
                failures.append(Failure(key, *clip))
        taken.failures += failures
        self.board.count(0, failures)
        taken.left -= 1
        at_once = clips_per_call(self.recipe, job.work.bucket)
        while len(taken.pixels) >= at_once or (taken.pixels and not taken.left):
            self._encode(job.work, taken, at_once, encoder, device)
        if not taken.left:
            self.board.finish(job.work, taken.records, taken.failures, self._notes(taken))
            del self.taken[job.work.name]

    def _encode(
        self,
        work: WorkList,
        taken: _Taken,
        at_once: int,
        encoder: VideoEncoder,
        device: torch.device,
    ) -> None:
        keys, taken.keys = taken.keys[:at_once], taken.keys[at_once:]
        pixels, taken.pixels = taken.pixels[:at_once], taken.pixels[at_once:]
        started = time.perf_counter()
        pixels_BCTHW = torch.stack(pixels).to(device, non_blocking=True)
        stats = encoder.encode(pixels_BCTHW)
        dtype = torch.bfloat16 if self.recipe.latents == "bf16" else torch.float32
        mean_BCTHW = stats.mean_BCTHW.to(dtype).cpu()
        logvar_BCTHW = None if stats.logvar_BCTHW is None else stats.logvar_BCTHW.to(dtype).cpu()
        self.board.time(work, len(keys), time.perf_counter() - started)
        bad = []
        for row, key in enumerate(keys):
            mean_CTHW = mean_BCTHW[row]
            logvar_CTHW = None if logvar_BCTHW is None else logvar_BCTHW[row]
            if not all(
                bool(part.isfinite().all()) for part in (mean_CTHW, logvar_CTHW) if part is not None
            ):
                bad.append(_not_finite(key, "clip"))
                continue
            packed = pack(mean_CTHW, logvar_CTHW, self.recipe.latents)
            if self.recipe.latents == "8bit":
                taken.error.add(mean_CTHW, logvar_CTHW, packed, self.scale_C)
            taken.records.append(Record(key, packed))
        taken.failures += bad
        self.board.count(len(keys) - len(bad), bad)

    def _notes(self, taken: _Taken) -> dict[str, Any]:
        notes: dict[str, Any] = {
            "latents": self.recipe.latents,
            "encoder": self.recipe.video.provenance,
        }
        if self.recipe.latents == "8bit":
            notes["error"] = dataclasses.asdict(taken.error)
        return notes


def clips_per_call(recipe: Recipe, bucket: int) -> int:
    """How many clips the video encoder is given at once."""
    num_frames, height, width = recipe.buckets[bucket]
    at_once = max(1, _PIXELS_PER_CALL // (num_frames * height * width))
    return min(at_once, _MAX_CLIPS_PER_CALL)


def _not_finite(key: bytes, what: str) -> Failure:
    text = f"the encoder makes infinities of this {what}, or no numbers at all: is its dtype fp16?"
    return Failure(raw_key(key), "not_finite", text)
