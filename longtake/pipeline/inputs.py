"""From a batch to what the transformer sees: latents and a condition.

Shape letters: B batch, C channels, T frames, H W height and width, L text tokens, K their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from longtake.data import Batch
from longtake.encoders import PromptEmbeds, TextEncoder, VideoEncoder
from longtake.pipeline.shared import SharedEncoding
from longtake.randomness import SampleKeys, Stream, normal
from longtake.store import EncodedBatch

# This part of a step, as a profile shows it.
ENCODE = "longtake.encode"

_ALONE = SharedEncoding()


@dataclass(frozen=True)
class Inputs:
    """One micro-batch, encoded."""

    clean_BCTHW: Tensor  # normalized latents
    condition: dict[str, Tensor]  # keyword arguments of the model
    keys: SampleKeys  # what every further random draw of these samples is keyed by
    pixel_size: tuple[int, int]  # height and width before encoding
    weights_B: Tensor  # 1, or 0 for samples that only fill a batch


@torch.no_grad()
@record_function(ENCODE)
def encode_batch(
    batch: Batch | EncodedBatch,
    *,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
    seed: int,
    device: torch.device,
    with_sizes: bool = False,
    shared: SharedEncoding = _ALONE,
) -> Inputs:
    """Encode pixels and captions; the posterior noise belongs to the sample, like every other draw.

    Of a batch that was encoded before, only the draw and the scaling are left to do, and what a
    store lacks. Without text the condition is the batch's labels. `with_sizes` adds what a model
    with micro-conditioning wants. `shared` is how a group of processes shares the encoding of one
    batch, which all of them then encode together.
    """
    captions = batch.captions
    if isinstance(batch, EncodedBatch) and batch.is_partial:
        shared = shared.if_same(batch.to_encode())
    batch = batch.to(device)
    keys = batch.keys(seed)
    is_encoded = isinstance(batch, EncodedBatch)
    encode = shared.video(video_encoder)
    stats = batch.stats(encode) if is_encoded else encode(batch.pixels_BCTHW)
    noise_BCTHW = None
    if stats.logvar_BCTHW is not None:
        noise_BCTHW = normal(keys, Stream.POSTERIOR, tuple(stats.mean_BCTHW.shape[1:]))
    if is_encoded and batch.embeds_BLK is not None:
        encode_text = None if text_encoder is None else shared.text(text_encoder)
        condition = _prompt_condition(batch.prompt(encode_text))
    elif text_encoder is None:
        condition = {"labels_B": batch.labels_B}
    else:
        assert not isinstance(batch, EncodedBatch), "a store without text is read without encoder"
        condition = _prompt_condition(shared.text(text_encoder)(captions))
    height, width = batch.pixel_size
    if with_sizes:
        condition |= size_condition(len(captions), height, width, device)
    return Inputs(
        clean_BCTHW=video_encoder.finish(stats, noise_BCTHW),
        condition=condition,
        keys=keys,
        pixel_size=(height, width),
        weights_B=batch.weights_B,
    )


def text_condition(text_encoder: TextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """The model's keyword arguments for captions: embeddings (B, L, K) and their mask (B, L)."""
    return _prompt_condition(text_encoder.encode(captions))


def _prompt_condition(prompt: PromptEmbeds) -> dict[str, Tensor]:
    return {"prompt_embeds_BLK": prompt.embeds_BLK, "prompt_mask_BL": prompt.mask_BL}


def size_condition(count: int, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """The keyword arguments of a model with micro-conditioning: pixels and height over width."""
    # Filled on the device: a tensor made from a list would be copied there while the host waits.
    height_B = torch.full((count,), height, dtype=torch.float32, device=device)
    width_B = torch.full((count,), width, dtype=torch.float32, device=device)
    return {
        "image_size_B2": torch.stack((height_B, width_B), dim=1),
        "aspect_ratio_B": height_B / width_B,
    }
