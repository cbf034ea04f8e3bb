"""Hashed words: the same vectors everywhere, true lengths, near-orthogonal words."""

import pytest
import torch

from longtake.encoders.hashed_words import HashedWordsEncoder, _signs, split_words


def test_hashed_words_vectors_are_the_same_on_every_platform() -> None:
    # The first two bytes of SHAKE-256("cat"), least significant bit first.
    signs = "".join("+" if value > 0 else "-" for value in _signs("cat", 64)[:16].tolist())
    assert signs == "+--+---+-+--+-+-"
    assert torch.equal(_signs("cat", 64).abs(), torch.ones(64))


def test_hashed_words_mask_has_the_true_length_with_an_end_token() -> None:
    prompt = HashedWordsEncoder(max_tokens=5).encode(["", "A cat", "one two three four five six"])
    assert prompt.embeds_BLK.shape == (3, 5, 64)
    assert prompt.mask_BL.dtype == torch.bool
    assert prompt.mask_BL.sum(1).tolist() == [1, 3, 5]
    assert not prompt.embeds_BLK[~prompt.mask_BL].any()
    # Every caption ends in the same token, which differs by its position only.
    alone = HashedWordsEncoder(max_tokens=5).encode([""]).embeds_BLK[0, 0]
    assert torch.equal(prompt.embeds_BLK[0, 0], alone)


def test_hashed_words_embeddings_have_unit_variance_and_tell_words_and_order_apart() -> None:
    encoder = HashedWordsEncoder(channels=512, max_tokens=16)
    text = "red car drives along the sunny coast while birds follow it home"
    embeds = encoder.encode([text]).embeds_BLK[0, :13]
    assert float(embeds.std()) == pytest.approx(1.0, abs=0.05)
    words = torch.stack([_signs(word, 512) for word in split_words(text)])
    similarity = words @ words.T / 512 - torch.eye(len(words))
    assert float(similarity.abs().max()) < 0.2
    first, second = encoder.encode(["dog bites man", "man bites dog"]).embeds_BLK
    assert not torch.allclose(first, second)


def test_hashed_words_normalize_case_and_unicode_and_split_punctuation() -> None:
    assert split_words("  A Café, déjà-vu!") == ["a", "café", ",", "déjà", "-", "vu", "!"]
    assert split_words("Cafe\u0301") == ["café"]


def test_hashed_words_errors() -> None:
    with pytest.raises(ValueError, match="channels=60 must be a positive multiple of 8"):
        HashedWordsEncoder(channels=60)
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        HashedWordsEncoder(max_tokens=0)
