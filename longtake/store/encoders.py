"""A store's encoders, without their weights: what training needs of them, from what the store wrote
down. Where more is asked, to decode a sample or encode a prompt, the real one is built for it.

Letters: B batch, C channels, T frames, H W height and width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from longtake.encoders import (
    LatentStats,
    PromptEmbeds,
    TextEncoder,
    TextEncoderConfig,
    VideoEncoder,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.encoders.protocol import sample_posterior
from longtake.store.recipe import Recipe, StoredEncoder, identity
from longtake.store.tensor_file import StoreError

_Encoder = TypeVar("_Encoder", VideoEncoder, TextEncoder)

# Settings that say where and how the encoder runs, not which one it is. Its precision counts when
# encoding: a store of another precision is another store, but no other encoder.
_NOT_COMPARED = {"path", "subfolder", "revision", "tokenizer_path", "tokenizer_subfolder"}
_NOT_COMPARED |= {"dtype", "frames_per_call", "memory_gib", "weights"}
_NOT_COMPARED |= {"num_lengths", "compile", "channels_last", "placement"}


class _OnDemand(Generic[_Encoder]):
    """The real encoder: built when first asked for, compared with the store's, and released."""

    def __init__(self, stored: StoredEncoder, what: str, build: Callable[[], _Encoder]) -> None:
        self._stored, self._what, self._build = stored, what, build
        self._built: _Encoder | None = None

    def get(self) -> _Encoder:
        """Raises ValueError if it is another encoder than the store's."""
        if self._built is None:
            built = self._build()
            _compare(self._stored, built.provenance, self._what)
            self._built = built
        return self._built

    def release(self) -> None:
        """Gives its memory back, until it is asked for again."""
        self._built = None

    def check(self) -> None:
        """Builds it for a moment. Raises as `get`."""
        self.get()
        self.release()


class StoredVideoEncoder:
    """A video encoder of which `finish` and the shapes are known from a store."""

    def __init__(
        self, recipe: Recipe, config: VideoEncoderConfig, device: torch.device, seed: int
    ) -> None:
        self._recipe = recipe
        facts = recipe.video.facts
        self.latent_channels: int = facts["latent_channels"]
        self.downsample: tuple[int, int, int] = tuple(facts["downsample"])
        self.latent_mean: list[float] = facts["latent_mean"]
        self.latent_scale: list[float] = facts["latent_scale"]
        self.provenance: dict[str, object] = recipe.video.provenance
        self._mean_C111 = torch.tensor(self.latent_mean, device=device).view(-1, 1, 1, 1)
        self._scale_C111 = torch.tensor(self.latent_scale, device=device).view(-1, 1, 1, 1)
        self.real = _OnDemand(
            recipe.video, "video encoder", lambda: build_video_encoder(config, device, seed)
        )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' (C, T, H, W). Raises ValueError if the encoder cannot take such a clip."""
        sizes = num_frames, height, width
        if sizes in self._recipe.buckets:
            return self._recipe.latent_shapes[self._recipe.buckets.index(sizes)]
        return self.real.get().latent_shape(num_frames, height, width)

    def encode(self, pixels_BCTHW: Tensor) -> LatentStats:
        """By the real encoder: the store has what its own clips need."""
        return self.real.get().encode(pixels_BCTHW)

    def finish(self, stats: LatentStats, noise_BCTHW: Tensor | None = None) -> Tensor:
        """(posterior sample - mean) * scale, in float32, as the real encoder does."""
        return (sample_posterior(stats, noise_BCTHW) - self._mean_C111) * self._scale_C111

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """By the real encoder."""
        return self.real.get().decode(latents_BCTHW)


class StoredTextEncoder:
    """A text encoder whose embeddings lie in a store."""

    def __init__(
        self, recipe: Recipe, config: TextEncoderConfig, device: torch.device, seed: int
    ) -> None:
        assert recipe.text is not None
        self.channels: int = recipe.text.facts["channels"]
        self.max_tokens: int = recipe.text.facts["max_tokens"]
        self.provenance: dict[str, object] = recipe.text.provenance

        def build() -> TextEncoder:
            encoder = build_text_encoder(config, device, seed)
            assert encoder is not None
            return encoder

        self.real = _OnDemand(recipe.text, "text encoder", build)

    def encode(self, captions: Sequence[str]) -> PromptEmbeds:
        """By the real encoder: the store has only its own captions."""
        return self.real.get().encode(captions)


def stored_encoders(
    recipe: Recipe,
    video_config: VideoEncoderConfig,
    text_config: TextEncoderConfig,
    device: torch.device,
    seed: int,
) -> tuple[StoredVideoEncoder, StoredTextEncoder | None]:
    """The encoders of a run that reads a store; text is None for a run conditioned on labels.

    Raises:
        ValueError: the run's configuration is that of another encoder, or the store's is not valid.
    """
    try:
        video = StoredVideoEncoder(recipe, video_config, device, seed)
        _check_config(recipe.video, dataclasses.asdict(video_config), "video_encoder")
        text = None
        if text_config.kind != "none" and recipe.text is not None:
            text = StoredTextEncoder(recipe, text_config, device, seed)
            _check_config(recipe.text, dataclasses.asdict(text_config), "text_encoder")
    except (KeyError, TypeError, RuntimeError) as error:
        raise StoreError(None, f"not a recipe of a latent store ({error!r:.200})") from error
    # The files have another name: whether they are the same, only the weights can tell.
    if _has_moved(recipe.video, dataclasses.asdict(video_config)):
        video.real.check()
    if text is not None and _has_moved(recipe.text, dataclasses.asdict(text_config)):
        text.real.check()
    return video, text


def check_encoders(
    recipe: Recipe, video_encoder: VideoEncoder, text_encoder: TextEncoder | None
) -> None:
    """Whether a store, say of held-out clips, was encoded with what the run trains with.

    Raises:
        ValueError: naming what differs.
    """
    _compare(recipe.video, video_encoder.provenance, "video encoder")
    facts = recipe.video.facts
    for name in ("latent_mean", "latent_scale"):
        if facts[name] != getattr(video_encoder, name):
            raise ValueError(
                f"the latent store's {name} is {facts[name]!r:.60}, the run's "
                f"{getattr(video_encoder, name)!r:.60}: encode again"
            )
    if text_encoder is not None and recipe.text is not None:
        _compare(recipe.text, text_encoder.provenance, "text encoder")


def _check_config(stored: StoredEncoder, config: dict[str, Any], what: str) -> None:
    """Compares those settings that are in use, by the store's kind of encoder."""
    before = stored.config
    if before["kind"] != config["kind"]:
        _refuse(what, "kind", config["kind"], before["kind"])
    for name, value in config.items():
        used = name not in _NOT_COMPARED and _is_used(name, config["kind"])
        if used and json.loads(json.dumps(value)) != before.get(name):
            _refuse(what, name, value, before.get(name))


def _is_used(name: str, kind: str) -> bool:
    own = {
        "dct": name.startswith("dct_"),
        "diffusers": not name.startswith("dct_"),
        "hashed-words": name in ("max_tokens", "channels"),
        "t5": name != "channels",
        "umt5": name != "channels",
    }
    return own[kind]


def _has_moved(stored: StoredEncoder | None, config: dict[str, Any]) -> bool:
    if stored is None or config["kind"] in ("dct", "hashed-words"):
        return False
    names = ("path", "subfolder", "revision", "weights")
    return any(config[name] != stored.config.get(name) for name in names)


def _refuse(what: str, name: str, value: object, stored: object) -> None:
    raise ValueError(
        f"{what}.{name}={value}, but the latent store was encoded with {stored}: "
        f"set {what}.{name}={stored}, or encode again"
    )


def _compare(stored: StoredEncoder, provenance: dict[str, object], what: str) -> None:
    """Raises ValueError unless both are the same encoder, whatever their precision."""
    now, before = (
        {key: value for key, value in json.loads(json.dumps(identity(p))).items() if key != "dtype"}
        for p in (provenance, stored.provenance)
    )
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"another {what} than the latent store was encoded with: its {key} is "
            f"{now.get(key)!r:.80}, the store's {before.get(key)!r:.80}; source "
            f"{provenance.get('source')!r}, the store's {stored.provenance.get('source')!r}"
        )
