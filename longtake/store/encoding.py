"""Encoders at work: what one process does for a store, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.data import DataConfig, Manifest, open_manifest
from longtake.encoders import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.store.board import Board, Tally
from longtake.store.forms import Form
from longtake.store.plan import WorkList
from longtake.store.rates import Rates, measure_rates
from longtake.store.recipe import make_recipe
from longtake.store.writer import encode_captions, encode_clips


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is told before it encodes for a store."""

    store: Path
    data: DataConfig
    video: VideoEncoderConfig
    text: TextEncoderConfig
    seed: int
    """Decides random weights only."""
    latents: Form


class Encoding:
    """The encoders of a job, built, on one device."""

    num_workers = 1
    """Processes whose work a tally counts."""

    def __init__(self, job: Job, device: torch.device, manifest: Manifest | None = None) -> None:
        self.job, self.device = job, device
        self.manifest = open_manifest(job.data) if manifest is None else manifest
        self.video_encoder = build_video_encoder(job.video, device, job.seed)
        self.text_encoder = build_text_encoder(job.text, device, job.seed)
        self.recipe = make_recipe(
            job.data,
            video_config=job.video,
            video_encoder=self.video_encoder,
            text_config=job.text,
            text_encoder=self.text_encoder,
            latents=job.latents,
        )

    def measure(self, captions: Sequence[str]) -> Rates:
        """What encoding costs, see `measure_rates`."""
        return measure_rates(
            captions,
            self.recipe,
            video_encoder=self.video_encoder,
            text_encoder=self.text_encoder,
            device=self.device,
        )

    def encode(
        self, work: Sequence[WorkList], tally: Tally, *, share: int = 0, shares: int = 1
    ) -> None:
        """Does the lists, captions first; returns when all are done, whoever did them."""
        text, clips = (
            Board(
                self.job.store,
                [item for item in work if item.kind == kind],
                tally,
                share=share,
                shares=shares,
            )
            for kind in ("text", "clips")
        )
        if self.text_encoder is not None:
            encode_captions(
                text, manifest=self.manifest, recipe=self.recipe, encoder=self.text_encoder
            )
        encode_clips(
            clips,
            manifest=self.manifest,
            recipe=self.recipe,
            config=self.job.data,
            encoder=self.video_encoder,
            device=self.device,
        )
