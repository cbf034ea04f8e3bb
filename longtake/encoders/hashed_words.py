"""A text encoder without weights: each word is a fixed random vector that its hash decides.

Words that differ are nearly orthogonal and words that agree are equal, everywhere and always;
nothing is known of their meaning. Enough to tell captions apart, for tests, benchmarks and the
quickstart.

Shapes: B batch, L tokens, K channels.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longtake.encoders.protocol import PromptEmbeds

_WORD = re.compile(r"\w+|[^\w\s]")
_END = "</s>"  # No word of a caption can be this one: punctuation is split from letters.


class HashedWordsEncoder:
    """Random vectors of words plus those of their positions; unit variance, deterministic.

    A caption is normalized (Unicode NFC, lower case) and split into words and punctuation marks,
    cut to `max_tokens - 1` of them and closed by one end token; the empty caption is the end token
    alone.
    """

    def __init__(
        self, *, channels: int = 64, max_tokens: int = 16, device: torch.device | str = "cpu"
    ) -> None:
        if channels < 8 or channels % 8:
            raise ValueError(f"channels={channels} must be a positive multiple of 8: use 64")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        self.channels = channels
        self.max_tokens = max_tokens
        self._device = torch.device(device)
        # No word contains a space: words and positions never share a vector.
        positions = [_signs(f"position {index}", channels) for index in range(max_tokens)]
        self._position_LK = torch.stack(positions)
        self.provenance: dict[str, object] = {
            "class": "HashedWordsEncoder",
            "what": "fixed random vector per word, not a language model",
            "weights": "none needed",
            "channels": channels,
            "max_tokens": max_tokens,
            "dtype": "float32",
        }

    def encode(self, captions: Sequence[str]) -> PromptEmbeds:
        """Embeddings (B, max_tokens, channels), float32, and their mask."""
        embeds_BLK = torch.zeros(len(captions), self.max_tokens, self.channels)
        mask_BL = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for embeds_LK, mask_L, caption in zip(embeds_BLK, mask_BL, captions, strict=True):
            words = [*split_words(caption)[: self.max_tokens - 1], _END]
            words_LK = torch.stack([_signs(word, self.channels) for word in words])
            # Two independent vectors of unit variance: over sqrt(2) their sum has it too.
            embeds_LK[: len(words)] = (words_LK + self._position_LK[: len(words)]) / math.sqrt(2)
            mask_L[: len(words)] = True
        return PromptEmbeds(
            embeds_BLK.to(self._device, non_blocking=True),
            mask_BL.to(self._device, non_blocking=True),
        )


def split_words(caption: str) -> list[str]:
    """Words and punctuation marks of a caption, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


@lru_cache(maxsize=65536)
def _signs(name: str, channels: int) -> Tensor:
    """+1 or -1 per channel, from the bits of a hash: the same on every platform, exactly."""
    digest = hashlib.shake_256(name.encode(errors="surrogatepass")).digest(channels // 8)
    bits = [byte >> shift & 1 for byte in digest for shift in range(8)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1
