"""A store as a source of clips: statistics and text embeddings in place of pixels and captions.

A store that holds a part only is read beside the media files it was made from: what it lacks comes
as pixels and captions, for the step to encode.

Reads by offset, one clip at a time, in any order. Nothing is mapped into memory but the index: a
mapped file that is cut short kills the process that touches it, while a read that comes up short is
just another sample that cannot be used.

Letters: B samples, P some of them, C channels, T frames, H W latent height and width, L tokens,
K their width.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.data import DataConfig, MediaError, MediaSource, Samples, Source, View, open_manifest
from longtake.data.source import place_at, position_of
from longtake.data.stream import eligible
from longtake.encoders import LatentStats, PromptEmbeds
from longtake.store.forms import unpack
from longtake.store.index import NOT_STORED, Index, is_store, read_index
from longtake.store.recipe import bucket_sizes, check_data
from longtake.store.remote import RemoteStore, is_url
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
    pixels_PCTHW: Tensor | None = None  # uint8; the clips that the store lacks, None if it has all
    pixel_rows_P: Tensor | None = None  # int64, whose they are; the other tensors have zeros there
    text_rows_P: Tensor | None = None  # int64, whose captions the store lacks
    missing_captions: list[str] = field(default_factory=list)
    """Those of `text_rows_P`."""
    is_partial: bool = False
    """Whether the store lacks something of the run, if not of this batch."""

    def to_encode(self) -> list[object]:
        """What tells apart two batches of the same slots that encoders are given different parts
        of: as a sample that cannot be read is replaced, and on one process maybe alone."""
        rows = (self.pixel_rows_P, self.text_rows_P)
        listed = [None if rows_P is None else rows_P.tolist() for rows_P in rows]
        return [*listed, self.captions, [bad.sample_id for bad in self.bad]]

    def stats(self, encode: Callable[[Tensor], LatentStats]) -> LatentStats:
        """Of all clips; `encode` is given the pixels_PCTHW of those that the store lacks."""
        if self.pixels_PCTHW is None:
            return LatentStats(self.mean_BCTHW, self.logvar_BCTHW)
        assert self.pixel_rows_P is not None
        encoded = encode(self.pixels_PCTHW)
        if len(self.pixels_PCTHW) == len(self.mean_BCTHW):
            return encoded
        mean_BCTHW = _with_rows(self.mean_BCTHW, self.pixel_rows_P, encoded.mean_BCTHW)
        if encoded.logvar_BCTHW is None:
            return LatentStats(mean_BCTHW)
        logvar_BCTHW = self.logvar_BCTHW
        if logvar_BCTHW is None:  # nothing was kept but what stands for unreadable clips
            logvar_BCTHW = torch.full_like(self.mean_BCTHW, _NARROW)
        return LatentStats(
            mean_BCTHW, _with_rows(logvar_BCTHW, self.pixel_rows_P, encoded.logvar_BCTHW)
        )

    def prompt(self, encode: Callable[[Sequence[str]], PromptEmbeds] | None) -> PromptEmbeds:
        """Of all captions; `encode` is given those that the store lacks."""
        assert self.embeds_BLK is not None, "read without text"
        assert self.mask_BL is not None
        if self.text_rows_P is None:
            return PromptEmbeds(self.embeds_BLK, self.mask_BL)
        assert encode is not None, "the store lacks captions, and there is no text encoder"
        encoded = encode(self.missing_captions)
        if len(self.missing_captions) == len(self.captions):
            return encoded
        length = max(self.embeds_BLK.shape[1], encoded.embeds_BLK.shape[1])
        embeds_BLK, mask_BL = (
            _with_rows(_lengthened(kept, length), self.text_rows_P, _lengthened(rows, length))
            for kept, rows in (
                (self.embeds_BLK, encoded.embeds_BLK),
                (self.mask_BL, encoded.mask_BL),
            )
        )
        return PromptEmbeds(embeds_BLK, mask_BL)


@dataclass(frozen=True)
class EncodedClip:
    """What a store has of a sample; pixels in place of statistics, and no embeddings of a caption,
    where it has none."""

    mean_CTHW: Tensor | None
    logvar_CTHW: Tensor | None
    embeds_LK: Tensor | None
    pixels_CTHW: Tensor | None = None


class StoreSource:
    """The samples of a store. Random places in time are those it has; crops are what was stored."""

    def __init__(
        self,
        folder: str | Path,
        config: DataConfig,
        *,
        with_text: bool,
        media: MediaSource | None = None,
    ) -> None:
        """`media` has what the store lacks; its manifest must be the one that was encoded."""
        self.name = str(folder)
        self.remote = RemoteStore(self.name) if is_url(folder) else None
        self.folder = Path(folder) if self.remote is None else self.remote.fetch()
        self.media = media
        self.index: Index = read_index(self.folder)
        self.recipe = self.index.recipe
        check_data(self.recipe, config, str(folder))
        if with_text and self.recipe.text is None:
            raise ValueError(
                f"the latent store {folder} holds no text embeddings, but the model is conditioned "
                "on text: encode again with the text encoder of the run"
            )
        self.manifest = self.index.manifest if media is None else media.manifest
        self.config, self.with_text = config, with_text
        sizes = [bucket_sizes(bucket) for bucket in config.buckets]
        self._stored = [self.recipe.buckets.index(size) for size in sizes]
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor
        self._check_manifest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked opens the store itself, instead of being sent the index.
        build = partial(StoreSource, with_text=self.with_text, media=self.media)
        return build, (self.name, self.config)

    def _check_manifest(self) -> None:
        facts = self.index.facts
        if self.media is None:
            if "disk_budget" in facts and any(self.lacking):
                raise ValueError(
                    f"the latent store {self.name} holds only a part of its samples: give the "
                    "manifest it was made from as well, and what is missing is encoded in the "
                    f"step: --data.manifest {facts.get('manifest')} --data.store {self.name}"
                )
            return
        file = self.media.manifest.file
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != facts.get("manifest_sha256") or len(self.manifest) != len(self.index.text):
            raise ValueError(
                f"{file} is not the manifest that the latent store {self.name} was made from "
                f"({facts.get('manifest')}), or has changed since: run longtake encode again, "
                "which encodes only what is new"
            )

    @cached_property
    def lacking(self) -> tuple[bool, bool]:
        """Whether a run with this config needs clips, and captions, that the store has not got."""
        config, clips, text = self.config, False, False
        for bucket, stored in zip(config.buckets, self._stored, strict=True):
            pool = eligible(
                self.index.manifest, bucket, fps=config.fps, frame_interval=config.frame_interval
            )
            clips |= bool((self.index.clips[stored][pool.ids] == NOT_STORED).any())
            text |= bool((self.index.text[pool.ids] == NOT_STORED).any())
        return clips, text and self.with_text

    def read(self, sample_id: int, bucket: int, view: View) -> EncodedClip:
        """The statistics stored for that place and side, and the caption's embedding.

        Raises:
            MediaError: what encoding said of it, or that the store's bytes are not what they were.
        """
        path = self.manifest.texts["path"][sample_id]
        stored = self._stored[bucket]
        shape = self.recipe.latent_shapes[stored]
        place = place_at(view.position, self.recipe.places)
        row = int(self.index.clips[stored][sample_id][self.recipe.variant(place, view.flip)])
        if row == NOT_STORED and self.media is not None:
            view = replace(view, position=position_of(place, self.recipe.places))
            pixels_CTHW = self.media.read(sample_id, bucket, view)
            return EncodedClip(None, None, self._embeds(path, sample_id), pixels_CTHW)
        record = self._entry(path, row)
        try:
            mean_CTHW, logvar_CTHW = unpack(record, shape, self.recipe.latents)
        except ValueError as error:
            raise MediaError(path, "corrupt", str(error)) from error
        return EncodedClip(mean_CTHW, logvar_CTHW, self._embeds(path, sample_id))

    def _embeds(self, path: str, sample_id: int) -> Tensor | None:
        if not self.with_text:
            return None
        if self.media is not None and self.index.text[sample_id] == NOT_STORED:
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
            text = f"not in the latent store {self.name}: run longtake encode again"
            raise MediaError(path, "missing", text)
        entries = self.index.entries
        shard = int(entries.shard_of[row])
        name = entries.shards[shard]
        data = torch.empty(int(entries.sizes[row]), dtype=torch.uint8)
        begin = int(entries.begins[row])
        try:
            if self.remote is None:
                count = os.preadv(self._file(shard, name), [data.numpy().data], begin)
            else:
                raw = self.remote.read(f"shards/{name}", begin, len(data))
                count = len(raw)
                data.numpy()[: len(raw)] = np.frombuffer(raw, np.uint8)[: len(data)]
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
        stored = self._stored[bucket]
        _, height, width = self.recipe.buckets[stored]
        dtype = torch.bfloat16 if self.recipe.latents == "bf16" else torch.float32
        shape = (len(clips), *self.recipe.latent_shapes[stored])
        mean_BCTHW = torch.zeros(shape, dtype=dtype)
        logvar_BCTHW = None
        for row, clip in enumerate(clips):
            if clip.mean_CTHW is not None:
                mean_BCTHW[row] = clip.mean_CTHW
            if clip.logvar_CTHW is not None:
                if logvar_BCTHW is None:
                    logvar_BCTHW = torch.full(shape, _NARROW, dtype=dtype)
                logvar_BCTHW[row] = clip.logvar_CTHW
        pixels = [clip.pixels_CTHW for clip in clips if clip.pixels_CTHW is not None]
        batch = EncodedBatch(
            mean_BCTHW=mean_BCTHW,
            logvar_BCTHW=logvar_BCTHW,
            embeds_BLK=None,
            mask_BL=None,
            pixel_size=(height, width),
            pixels_PCTHW=torch.stack(pixels) if pixels else None,
            pixel_rows_P=_rows([clip.mean_CTHW for clip in clips]),
            is_partial=self.media is not None and any(self.lacking),
            **samples,
        )
        if not self.with_text:
            return batch
        embeds = [clip.embeds_LK for clip in clips]
        embeds_BLK, mask_BL = self._padded(embeds)
        captions = zip(batch.captions, embeds, strict=True)
        return replace(
            batch,
            embeds_BLK=embeds_BLK,
            mask_BL=mask_BL,
            text_rows_P=_rows(embeds),
            missing_captions=[caption for caption, embeds_LK in captions if embeds_LK is None],
        )

    def _padded(self, embeds: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, K) and mask; where there is none, zeros and False."""
        assert self.recipe.text is not None
        longest = max(1 if one is None else len(one) for one in embeds)
        length = padded_length(longest, self.recipe.text.facts["max_tokens"])
        channels = self.recipe.text.facts["channels"]
        embeds_BLK = torch.zeros((len(embeds), length, channels), dtype=torch.bfloat16)
        mask_BL = torch.zeros((len(embeds), length), dtype=torch.bool)
        for row, embeds_LK in enumerate(embeds):
            if embeds_LK is not None:
                embeds_BLK[row, : len(embeds_LK)] = embeds_LK
                mask_BL[row, : len(embeds_LK)] = True
        return embeds_BLK, mask_BL


def _rows(stored: list[Tensor | None]) -> Tensor | None:
    """Where the store has nothing; None if it has everything."""
    rows = [row for row, one in enumerate(stored) if one is None]
    return torch.tensor(rows) if rows else None


def _with_rows(kept: Tensor, rows_P: Tensor, encoded: Tensor) -> Tensor:
    """`kept` with some rows replaced, in the wider of both dtypes."""
    dtype = torch.promote_types(kept.dtype, encoded.dtype)
    return kept.to(dtype).index_copy(0, rows_P, encoded.to(dtype))


def _lengthened(tokens: Tensor, length: int) -> Tensor:
    """A copy of (B, L) or (B, L, K) with zeros up to so many tokens."""
    longer = tokens.new_zeros((tokens.shape[0], length, *tokens.shape[2:]))
    longer[:, : tokens.shape[1]] = tokens
    return longer


def padded_length(longest: int, max_tokens: int) -> int:
    """The length to which a batch's captions are padded: that of its longest, rounded up to one of
    at most eight lengths."""
    step = 1
    while step * _TEXT_LENGTHS < max_tokens:
        step *= 2
    return min(max_tokens, -(-longest // step) * step)


def open_source(data: DataConfig, manifest: str | None = None, *, with_text: bool) -> Source:
    """The config's samples, or another manifest's: media files, a latent store, or files with a
    store beside them that has what it has.

    Raises:
        ValueError: the manifest or the store cannot be used, or the store not with this config.
    """
    path = manifest or data.manifest
    if path and (is_url(path) or is_store(Path(path))):
        if data.store and manifest is None:
            raise ValueError(
                f"data.manifest={path} is a latent store itself: give the manifest of the media "
                f"files with data.store={data.store}, or leave data.store unset"
            )
        return StoreSource(path, data, with_text=with_text)
    media = MediaSource(data, open_manifest(data, manifest))
    if data.store and manifest is None:
        if not is_url(data.store) and not is_store(Path(data.store)):
            raise ValueError(
                f"data.store={data.store} is not a latent store: make one with longtake encode "
                "--output, or leave it unset"
            )
        return StoreSource(data.store, data, with_text=with_text, media=media)
    return media
