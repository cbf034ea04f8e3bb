"""A store as a source of clips: statistics and text embeddings in place of pixels and captions.

Reads by offset, one clip at a time, in any order. Nothing is mapped into memory but the index: a
mapped file that is cut short kills the process that touches it, while a read that comes up short is
just another sample that cannot be used.

Letters: B samples, C channels, T frames, H W latent height and width, L tokens, K their width.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data import DataConfig, MediaError, MediaSource, Samples, Source, View, open_manifest
from longtake.data.source import place_at
from longtake.encoders import LatentStats, PromptEmbeds
from longtake.store.forms import unpack
from longtake.store.index import NOT_STORED, Index, is_store, read_index
from longtake.store.recipe import bucket_sizes, check_data
from longtake.store.shards import shards_folder
from longtake.store.tensor_file import StoreError, open_file

_OPEN_FILES = 64
_NARROW = -30.0  # The log-variance that autoencoders clamp to: a point.
# A batch's captions are padded to one of so many lengths: every other length of text would be
# another graph to compile.
_TEXT_LENGTHS = 8


@dataclass(frozen=True, kw_only=True)
class EncodedBatch(Samples):
    """One micro-batch of what encoders made of clips and captions."""

    mean_BCTHW: Tensor  # bfloat16, or float32 from 8 bits
    logvar_BCTHW: Tensor | None
    embeds_BLK: Tensor | None  # bfloat16; None if the store has no text
    mask_BL: Tensor | None  # bool
    pixel_size: tuple[int, int]
    """Height and width before encoding."""

    @property
    def stats(self) -> LatentStats:
        return LatentStats(self.mean_BCTHW, self.logvar_BCTHW)

    @property
    def prompt(self) -> PromptEmbeds:
        assert self.embeds_BLK is not None, "read without text"
        assert self.mask_BL is not None
        return PromptEmbeds(self.embeds_BLK, self.mask_BL)


@dataclass(frozen=True)
class EncodedClip:
    mean_CTHW: Tensor
    logvar_CTHW: Tensor | None
    embeds_LK: Tensor | None


class StoreSource:
    """The samples of a store. Random places in time are those it has; crops are what was stored."""

    def __init__(self, folder: str | Path, config: DataConfig, *, with_text: bool) -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        self.recipe = self.index.recipe
        check_data(self.recipe, config, str(folder))
        if with_text and self.recipe.text is None:
            raise ValueError(
                f"the latent store {folder} holds no text embeddings, but the model is conditioned "
                "on text: encode again with the text encoder of the run"
            )
        self.manifest = self.index.manifest
        self.config, self.with_text = config, with_text
        sizes = [bucket_sizes(bucket) for bucket in config.buckets]
        self._stored = [self.recipe.buckets.index(size) for size in sizes]
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked opens the store itself, instead of being sent the index.
        return partial(StoreSource, with_text=self.with_text), (self.folder, self.config)

    def read(self, sample_id: int, bucket: int, view: View) -> EncodedClip:
        """The statistics stored for that place and side, and the caption's embedding.

        Raises:
            MediaError: what encoding said of it, or that the store's bytes are not what they were.
        """
        path = self.manifest.texts["path"][sample_id]
        stored = self._stored[bucket]
        shape = self.recipe.latent_shapes[stored]
        place = place_at(view.position, self.recipe.places)
        rows = self.index.clips[stored][sample_id]
        record = self._entry(path, int(rows[self.recipe.variant(place, view.flip)]))
        try:
            mean_CTHW, logvar_CTHW = unpack(record, shape, self.recipe.latents)
        except ValueError as error:
            raise MediaError(path, "corrupt", str(error)) from error
        return EncodedClip(mean_CTHW, logvar_CTHW, self._embeds(path, sample_id))

    def _embeds(self, path: str, sample_id: int) -> Tensor | None:
        if not self.with_text:
            return None
        assert self.recipe.text is not None
        channels, longest = (self.recipe.text.facts[name] for name in ("channels", "max_tokens"))
        record = self._entry(path, int(self.index.text[sample_id]))
        length, rest = divmod(len(record), 2 * channels)
        if rest or not 1 <= length <= longest:
            raise MediaError(path, "corrupt", f"{len(record)} bytes are no text embedding")
        return record.view(torch.bfloat16).view(length, channels)

    def _entry(self, path: str, row: int) -> Tensor:
        """An entry's bytes, uint8, checked."""
        if row < NOT_STORED:
            reason, text = self.index.failures[NOT_STORED - 1 - row]
            raise MediaError(path, reason, text)  # type: ignore[arg-type]
        if row == NOT_STORED:
            text = f"not in the latent store {self.folder}: run longtake encode again"
            raise MediaError(path, "missing", text)
        entries = self.index.entries
        shard = int(entries.shard_of[row])
        name = entries.shards[shard]
        data = torch.empty(int(entries.sizes[row]), dtype=torch.uint8)
        try:
            count = os.preadv(
                self._file(shard, name), [data.numpy().data], int(entries.begins[row])
            )
        except (OSError, StoreError) as error:
            text = f"shard {name} of the latent store cannot be read ({error})"
            raise MediaError(path, "unreadable", text) from error
        if count != len(data) or zlib.crc32(data.numpy().data) != entries.checksums[row]:
            text = (
                f"damaged in shard {name} of the latent store: `longtake encode --verify` on it "
                "encodes this again"
            )
            raise MediaError(path, "corrupt", text)
        return data

    def _file(self, shard: int, name: str) -> int:
        """The shard's descriptor, one of the last few used."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        with open_file(shards_folder(self.folder) / name) as file:
            descriptor = os.dup(file.fileno())
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def blank(self, bucket: int) -> EncodedClip:
        """Zeros, with one token so that attention to the text is defined."""
        stored = self._stored[bucket]
        zeros_CTHW = torch.zeros(self.recipe.latent_shapes[stored])
        embeds_LK = None
        if self.with_text:
            assert self.recipe.text is not None
            embeds_LK = torch.zeros((1, self.recipe.text.facts["channels"]), dtype=torch.bfloat16)
        return EncodedClip(zeros_CTHW, None, embeds_LK)

    def batch(
        self, bucket: int, clips: list[EncodedClip], samples: Mapping[str, Any]
    ) -> EncodedBatch:
        _, height, width = self.recipe.buckets[self._stored[bucket]]
        logvars = [clip.logvar_CTHW for clip in clips]
        logvar_BCTHW = None
        if any(logvar is not None for logvar in logvars):
            like = next(logvar for logvar in logvars if logvar is not None)
            blank = torch.full_like(like, _NARROW)
            logvar_BCTHW = torch.stack([blank if one is None else one for one in logvars])
        means = [clip.mean_CTHW for clip in clips]
        dtype = torch.bfloat16 if self.recipe.latents == "bf16" else torch.float32
        embeds_BLK = mask_BL = None
        if self.with_text:
            embeds_BLK, mask_BL = self._padded([clip.embeds_LK for clip in clips])
        return EncodedBatch(
            mean_BCTHW=torch.stack([mean.to(dtype) for mean in means]),
            logvar_BCTHW=logvar_BCTHW,
            embeds_BLK=embeds_BLK,
            mask_BL=mask_BL,
            pixel_size=(height, width),
            **samples,
        )

    def _padded(self, embeds: list[Any]) -> tuple[Tensor, Tensor]:
        assert self.recipe.text is not None
        length = padded_length(max(map(len, embeds)), self.recipe.text.facts["max_tokens"])
        channels = self.recipe.text.facts["channels"]
        embeds_BLK = torch.zeros((len(embeds), length, channels), dtype=torch.bfloat16)
        mask_BL = torch.zeros((len(embeds), length), dtype=torch.bool)
        for row, embeds_LK in enumerate(embeds):
            embeds_BLK[row, : len(embeds_LK)] = embeds_LK
            mask_BL[row, : len(embeds_LK)] = True
        return embeds_BLK, mask_BL


def padded_length(longest: int, max_tokens: int) -> int:
    """The length to which a batch's captions are padded: that of its longest, rounded up to one of
    at most eight lengths."""
    step = 1
    while step * _TEXT_LENGTHS < max_tokens:
        step *= 2
    return min(max_tokens, -(-longest // step) * step)


def open_source(data: DataConfig, manifest: str | None = None, *, with_text: bool) -> Source:
    """The config's samples, or another manifest's: media files, or a latent store.

    Raises:
        ValueError: the manifest or the store cannot be used, or the store not with this config.
    """
    path = manifest or data.manifest
    if path and is_store(Path(path)):
        return StoreSource(path, data, with_text=with_text)
    return MediaSource(data, open_manifest(data, manifest))
