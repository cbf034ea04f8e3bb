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
    """Random-vector word embeddings plus a position code, unit variance per element; deterministic.

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
        self._position_LK = _position_code(max_tokens, channels)
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
            words_LK = torch.stack([_word_vector(word, self.channels) for word in words])
            # Two independent codes of unit variance: over sqrt(2) their sum has unit variance too.
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
def _word_vector(word: str, channels: int) -> Tensor:
    """+1 or -1 per channel, from the bits of a hash: the same on every platform, exactly."""
    digest = hashlib.shake_256(word.encode()).digest(channels // 8)
    bits = [byte >> shift & 1 for byte in digest for shift in range(8)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def _position_code(max_tokens: int, channels: int) -> Tensor:
    """sqrt(2) times the sines and cosines of arXiv:1706.03762, §3.5: (L, K), float32."""
    position_L1 = torch.arange(max_tokens, dtype=torch.float64)[:, None]
    frequency_K = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angle_LK = position_L1 * frequency_K
    return math.sqrt(2) * torch.cat((angle_LK.sin(), angle_LK.cos()), dim=1).float()
