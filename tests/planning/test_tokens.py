import pytest

from longtake.planning import TokenGrid, count_tokens, latent_size, token_grid


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "tokens"),
    [
        (1, 256, 256, 256),
        (16, 256, 256, 4_096),
        (16, 512, 512, 16_384),
        (64, 512, 512, 65_536),
        (360, 512, 512, 368_640),
    ],
)
def test_tokens_of_published_settings(num_frames, height, width, tokens):
    assert count_tokens(num_frames, height, width) == tokens


def test_one_minute_of_1080p_is_three_million_tokens():
    # 24 fps for 60 s, four frames to one; 1080 rows are 68 patches, the last of them half padding.
    latents = latent_size(24 * 60, 1080, 1920, downsample=(4, 8, 8))
    assert token_grid(latents) == TokenGrid(time=360, space=68 * 120)
    assert token_grid(latents).total == 2_937_600


def test_partial_blocks_and_patches_count_whole():
    assert latent_size(7, 17, 9, downsample=(4, 8, 8)) == (2, 3, 2)
    assert token_grid((3, 3, 2), patch=(2, 2, 2)) == TokenGrid(time=2, space=2)


@pytest.mark.parametrize(
    ("num_frames", "latent_frames"), [(1, 1), (2, 2), (5, 2), (17, 5), (18, 6)]
)
def test_causal_encoder_keeps_the_first_frame_by_itself(num_frames, latent_frames):
    assert latent_size(num_frames, 8, 8, downsample=(4, 8, 8), causal=True)[0] == latent_frames


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="height=0 must be at least 1"):
        count_tokens(16, 0, 256)
    with pytest.raises(ValueError, match=r"patch\[1\]=0 must be at least 1"):
        token_grid((16, 32, 32), patch=(1, 0, 2))
