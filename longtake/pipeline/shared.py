"""Encoding once for a group of processes that share the tokens of their samples.

They have the same clips and captions. Each encodes its part of them and all gather the whole:

    encoders of frames   the frames of all clips, in order      0 1 2 │ 3 4 .
    encoders of clips    whole clips, for frames depend on those before
    text encoders        captions

What fills the last part up is encoded too, which takes no time that the others do not take.

What a store lacks of a batch is shared as well, if it is the same for all: a process that alone
could not read a clip has another in its place, which the store may have.

Letters: B samples, C channels, T frames, H W height and width, L text tokens, K their width; F
frames or clips, each in a process's own part. N processes, H bytes of a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from longtake.encoders import LatentStats, PromptEmbeds, TextEncoder, VideoEncoder
from longtake.parallel import Mesh, TokenGroup, gather_rows

EncodeVideo = Callable[[Tensor], LatentStats]
EncodeText = Callable[[Sequence[str]], PromptEmbeds]


@dataclass(frozen=True)
class SharedEncoding:
    """How the processes of one group share encoding; without a group, each does all of it."""

    group: TokenGroup | None = None

    def if_same(self, batch: object) -> SharedEncoding:
        """This, or each process for itself where what they say of their batches (by its `repr`)
        differs. All of the group call it together; the host waits for theirs, but no GPU does."""
        if self.group is None:
            return self
        digest = hashlib.sha256(repr(batch).encode()).digest()
        own_1H = torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None]
        all_NH = gather_rows(own_1H, self.group, length=self.group.size)
        return self if bool((all_NH == own_1H).all()) else SharedEncoding()

    def video(self, encoder: VideoEncoder) -> EncodeVideo:
        """The encoder's `encode`, with the same result for clips that all of the group have."""
        group = self.group
        if group is None:
            return encoder.encode
        is_by_frame = encoder.downsample[0] == 1

        def encode(pixels_BCTHW: Tensor) -> LatentStats:
            count = len(pixels_BCTHW)
            clips = pixels_BCTHW
            if is_by_frame:
                clips = rearrange(clips, "b c t h w -> (b t) c 1 h w")
            stats = encoder.encode(group.own_rows(clips))
            whole = []
            for part in (stats.mean_BCTHW, stats.logvar_BCTHW):
                rows = None if part is None else gather_rows(part, group, length=len(clips))
                if rows is not None and is_by_frame:
                    rows = rearrange(rows, "(b t) c 1 h w -> b c t h w", b=count)
                whole.append(rows)
            return LatentStats(*whole)

        return encode

    def text(self, encoder: TextEncoder) -> EncodeText:
        """The encoder's `encode`, with the same result for captions that all of the group have."""
        group = self.group
        if group is None:
            return encoder.encode

        def encode(captions: Sequence[str]) -> PromptEmbeds:
            share = group.share(len(captions))
            own = list(captions[group.rank * share : (group.rank + 1) * share])
            # All call the encoder: where it is sharded, they meet in its collectives.
            part = encoder.encode(own + [""] * (share - len(own)))
            embeds_BLK = gather_rows(part.embeds_BLK, group, length=len(captions))
            mask_BL = gather_rows(part.mask_BL.to(torch.uint8), group, length=len(captions))
            return PromptEmbeds(embeds_BLK, mask_BL.bool())

        return encode


def share_encoding(mesh: Mesh) -> SharedEncoding:
    """The sharing of a run; all processes must call it together.

    In a process group of its own: encoding ahead, on a stream beside the training's, must not
    stand in the row of the training's exchanges, nor they in its.
    """
    return SharedEncoding(mesh.new_token_group())
