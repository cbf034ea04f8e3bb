"""What decides a store's content beside the clips themselves, and whether it suits a run.

The recipe is written into `store.json`. Its digests are part of every entry's key: whatever changes
the numbers makes other entries, and nothing else does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from longtake.data import Bucket, DataConfig
from longtake.encoders import TextEncoder, TextEncoderConfig, VideoEncoder, VideoEncoderConfig
from longtake.store.forms import Form, Shape
from longtake.store.tensor_file import StoreError

# To be raised when the same file, range and settings come out as other pixels than before.
_TRANSFORM = 1

# What is in an encoder's provenance but does not decide what it makes of its input: where it was
# found, with which version of a library, and what `finish` does later.
_NOT_DECISIVE = {
    "library",
    "source",
    "subfolder",
    "revision",
    "tokenizer",
    "weights",
    "what",
    "whitening",
    "latent_mean",
    "latent_scale",
}


@dataclass(frozen=True, kw_only=True)
class StoredEncoder:
    """What a store knows of an encoder that it was made with."""

    config: dict[str, Any]
    """The encoder's own config, as plain values."""
    provenance: dict[str, Any]
    facts: dict[str, Any]
    """What its protocol says beside that: channels, scale and so on."""

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the provenance that decides what it makes of its input."""
        return identity(self.provenance)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every clip and caption."""

    fps: float | None
    frame_interval: int
    places: int
    """At how many fixed places in its range each sample is stored."""
    flips: bool
    """Whether every clip is stored mirrored, too."""
    buckets: tuple[tuple[int, int, int], ...]
    """Frames, height and width in pixels."""
    latent_shapes: tuple[Shape, ...]
    """Of each bucket."""
    latents: Form
    video: StoredEncoder
    text: StoredEncoder | None

    @property
    def num_variants(self) -> int:
        """Clips stored of a sample for each bucket: places, and each of them mirrored."""
        return self.places * (2 if self.flips else 1)

    def variant(self, place: int, flip: bool) -> int:
        """The number of a clip among a sample's."""
        return place * (2 if self.flips else 1) + flip

    def clip_digest(self, bucket: int) -> bytes:
        """Of all that decides a clip of this bucket, beside file, range, place and flip."""
        return _digest(
            {
                "transform": _TRANSFORM,
                "fps": self.fps,
                "frame_interval": self.frame_interval,
                "crop": "center",
                "bucket": self.buckets[bucket],
                "latents": self.latents,
                "encoder": self.video.identity,
            }
        )

    def text_digest(self) -> bytes:
        """Of all that decides a caption's embedding, beside the caption."""
        assert self.text is not None
        return _digest({"encoder": self.text.identity})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Recipe:
        """The inverse of `to_json`. Raises StoreError for anything else."""
        try:
            encoders = {
                name: None if value[name] is None else StoredEncoder(**value[name])
                for name in ("video", "text")
            }
            recipe = cls(
                **{
                    **value,
                    "buckets": tuple(_sizes(sizes, 3) for sizes in value["buckets"]),
                    "latent_shapes": tuple(_sizes(sizes, 4) for sizes in value["latent_shapes"]),
                    **encoders,
                }
            )
            whole = (recipe.frame_interval, recipe.places)
            well = all(type(number) is int and number > 0 for number in whole)
            well &= recipe.latents in ("bf16", "8bit") and isinstance(recipe.flips, bool)
            well &= len(recipe.buckets) == len(recipe.latent_shapes)
            well &= _are_facts(recipe)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(None, f"not a recipe of a latent store ({error})") from error
        if not well:
            raise StoreError(None, "not a recipe of a latent store: values out of range")
        return recipe


def _are_facts(recipe: Recipe) -> bool:
    """Whether what a store says of its encoders is of the right kind."""
    facts = recipe.video.facts
    channels = facts["latent_channels"]
    numbers = [*facts["latent_mean"], *facts["latent_scale"]]
    sizes = [channels, *facts["downsample"]]
    well = len(facts["latent_mean"]) == len(facts["latent_scale"]) == channels
    well &= all(type(number) in (int, float) for number in numbers)
    well &= all(shape[0] == channels for shape in recipe.latent_shapes) and len(sizes) == 4
    encoders = [recipe.video]
    if recipe.text is not None:
        encoders.append(recipe.text)
        sizes += [recipe.text.facts["channels"], recipe.text.facts["max_tokens"]]
    well &= all(type(size) is int and 0 < size < 2**31 for size in sizes)
    parts = [part for encoder in encoders for part in (encoder.config, encoder.provenance)]
    return well and all(isinstance(part, dict) for part in parts)


def make_recipe(
    data: DataConfig,
    *,
    video_config: VideoEncoderConfig,
    video_encoder: VideoEncoder,
    text_config: TextEncoderConfig,
    text_encoder: TextEncoder | None,
    latents: Form = "bf16",
) -> Recipe:
    """The recipe by which this data and these encoders fill a store.

    Raises:
        ValueError: the data's settings are such that no store can hold what they make.
    """
    if data.crop == "random":
        raise ValueError(
            "data.crop=random is another crop every epoch, and a store holds one: "
            "use --data.crop center"
        )
    buckets = tuple(dict.fromkeys(map(bucket_sizes, data.buckets)))
    text = None
    if text_encoder is not None:
        text = StoredEncoder(
            config=dataclasses.asdict(text_config),
            provenance=text_encoder.provenance,
            facts={"channels": text_encoder.channels, "max_tokens": text_encoder.max_tokens},
        )
    return Recipe(
        fps=data.fps,
        frame_interval=data.frame_interval,
        places=max(1, data.clip_places) if data.clip_position == "random" else 1,
        flips=data.flip,
        buckets=buckets,
        latent_shapes=tuple(video_encoder.latent_shape(*sizes) for sizes in buckets),
        latents=latents,
        video=StoredEncoder(
            config=dataclasses.asdict(video_config),
            provenance=video_encoder.provenance,
            facts={
                "latent_channels": video_encoder.latent_channels,
                "downsample": list(video_encoder.downsample),
                "latent_mean": video_encoder.latent_mean,
                "latent_scale": video_encoder.latent_scale,
            },
        ),
        text=text,
    )


def check_data(recipe: Recipe, data: DataConfig, name: str) -> None:
    """Whether a store of this recipe holds the clips that a run wants.

    Raises:
        ValueError: naming the setting, what it is and what the store has.
    """
    for field, wanted, stored in (
        ("fps", data.fps, recipe.fps),
        ("frame_interval", data.frame_interval, recipe.frame_interval),
        ("crop", data.crop, "center"),
    ):
        if wanted != stored:
            raise ValueError(
                f"data.{field}={wanted}, but the latent store {name} was encoded with {stored}: "
                f"set data.{field}={stored}, or encode again"
            )
    if data.flip and not recipe.flips:
        raise ValueError(
            f"data.flip=True, but the latent store {name} holds no mirrored clips: set "
            "data.flip=False, or encode again with --data.flip True"
        )
    is_random = data.clip_position == "random"
    if is_random and data.clip_places not in (0, recipe.places):
        raise ValueError(
            f"data.clip_places={data.clip_places}, but the latent store {name} holds clips at "
            f"{recipe.places} places: set data.clip_places={recipe.places}, or 0 for those it has"
        )
    for bucket in data.buckets:
        if bucket_sizes(bucket) not in recipe.buckets:
            known = ", ".join("x".join(map(str, sizes)) for sizes in recipe.buckets)
            raise ValueError(
                f"bucket {bucket} is not in the latent store {name}, which holds {known}: "
                "train on those, or encode again with this one"
            )


def bucket_sizes(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.num_frames, bucket.height, bucket.width


def identity(provenance: dict[str, Any]) -> dict[str, Any]:
    """The part of an encoder's provenance that decides what it makes of its input."""
    return {key: value for key, value in provenance.items() if key not in _NOT_DECISIVE}


def _sizes(value: list[int], count: int) -> Any:
    if len(value) != count or not all(type(size) is int and 0 < size < 2**31 for size in value):
        raise ValueError(f"sizes {value!r:.80}")
    return tuple(value)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
