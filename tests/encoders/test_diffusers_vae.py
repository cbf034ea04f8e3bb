"""diffusers' autoencoders, on tiny random models: statistics, scale, slices, tiles, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.encoders import VideoEncoder, VideoEncoderConfig, build_video_encoder
from longtake.encoders.autoencoders import AUTOENCODERS
from longtake.encoders.protocol import sample_posterior
from longtake.parallel import compile_blocks

diffusers = pytest.importorskip("diffusers")

# Class -> (tiny config, frames of a clip, latent channels, pixels per latent in time and space).
TINY: dict[str, tuple[dict[str, Any], int, int, tuple[int, int]]] = {
    "AutoencoderKL": (
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "sample_size": 32,
            "scaling_factor": 0.4,
            "shift_factor": 0.1,
        },
        3,
        4,
        (1, 2),
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "num_encoder_blocks": (1, 1, 1, 1),
            "num_decoder_blocks": (1, 1, 1, 1),
            "scaling_factor": 0.7,
        },
        3,
        4,
        (1, 8),
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "scaling_factor": 0.3,
        },
        3,
        4,
        (1, 2),
    ),
    "AutoencoderKLWan": (
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [0.5, 2.0, 1.5, 1.0],
        },
        5,
        4,
        (4, 8),
    ),
    "AutoencoderKLHunyuanVideo": (
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
        5,
        4,
        (4, 8),
    ),
    "AutoencoderKLCogVideoX": (
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
        9,
        4,
        (4, 8),
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "scaling_factor": 0.9,
        },
        9,
        8,
        (8, 32),
    ),
}
IMAGE_CLASSES = [name for name, row in AUTOENCODERS.items() if row.temporal is None]
CLIP_CLASSES = [name for name, row in AUTOENCODERS.items() if row.temporal]

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each class, as `save_pretrained` writes it."""
    saved = {}
    for class_name, (config, *_) in TINY.items():
        torch.manual_seed(0)
        vae = getattr(diffusers, class_name)(**config)
        if class_name == "AutoencoderKLLTXVideo":
            vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
            vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
        saved[class_name] = tmp_path_factory.mktemp(class_name) / "pipeline" / "vae"
        vae.save_pretrained(saved[class_name])
    return saved


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Load:
    def build(class_name: str, **settings: Any) -> VideoEncoder:
        settings = {"path": str(folders[class_name])} | settings
        config = VideoEncoderConfig(kind="diffusers", class_name=class_name, **settings)
        return build_video_encoder(config, "cpu", 0)

    return build


def _pixels(class_name: str, *, batch: int = 2, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, TINY[class_name][1], height, width)
    return torch.rand(shape, generator=generator) * 2 - 1


def _own_encoding(vae: Any, pixels: Tensor) -> Any:
    """What the class itself returns, frame by frame for image classes."""
    if pixels.shape[2] > 1 and type(vae).__name__ in IMAGE_CLASSES:
        pixels = pixels.transpose(1, 2).flatten(0, 1)
    return vae.encode(pixels)


def _clips(frames: Tensor, like: Tensor) -> Tensor:
    if frames.ndim == 5:
        return frames
    return frames.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


@pytest.mark.parametrize("class_name", TINY)
def test_vae_statistics_are_those_of_the_class_itself(
    class_name: str, load: Load, folders: dict[str, Path]
) -> None:
    pixels = _pixels(class_name)
    stats = load(class_name).encode(pixels)
    vae = getattr(diffusers, class_name).from_pretrained(folders[class_name]).eval()
    with torch.no_grad():
        own = _own_encoding(vae, pixels)
    output = AUTOENCODERS[class_name].output
    if output == "latent_dist":
        assert stats.logvar_BCTHW is not None
        torch.testing.assert_close(stats.logvar_BCTHW, _clips(own.latent_dist.logvar, pixels))
        own_mean = own.latent_dist.mean
    else:
        assert stats.logvar_BCTHW is None
        own_mean = getattr(own, output)
    torch.testing.assert_close(stats.mean_BCTHW, _clips(own_mean, pixels))
    assert not stats.mean_BCTHW.requires_grad
    assert not stats.mean_BCTHW.is_inference()


@pytest.mark.parametrize("class_name", TINY)
def test_vae_shapes_follow_from_the_class_and_decoding_restores_them(
    class_name: str, load: Load
) -> None:
    _, frames, channels, (temporal, spatial) = TINY[class_name]
    encoder, pixels = load(class_name), _pixels(class_name)
    assert encoder.downsample == (temporal, spatial, spatial)
    latents = encoder.finish(encoder.encode(pixels))
    expected = (channels, 1 + (frames - 1) // temporal, 32 // spatial, 64 // spatial)
    assert latents.shape[1:] == encoder.latent_shape(frames, 32, 64) == expected
    restored = encoder.decode(latents)
    assert restored.shape == pixels.shape
    assert restored.dtype == torch.float32
    assert float(restored.abs().max()) <= 1


@pytest.mark.parametrize("class_name", TINY)
def test_vae_never_looks_at_values_on_the_host(
    class_name: str, load: Load, no_host_reads: Any
) -> None:
    encoder, pixels = load(class_name), _pixels(class_name, batch=1)
    with no_host_reads:
        encoder.decode(encoder.finish(encoder.encode(pixels)))


def test_vae_single_images_pass_through_clip_classes(load: Load) -> None:
    for class_name in CLIP_CLASSES:
        encoder = load(class_name)
        latents = encoder.finish(encoder.encode(_pixels(class_name)[:, :, :1]))
        assert latents.shape[2] == 1
        assert encoder.decode(latents).shape == (2, 3, 1, 32, 64)


def _documented(class_name: str, vae: Any, raw: Tensor) -> Tensor:
    """Each class's rule as its pipelines write it."""
    config = vae.config
    if class_name == "AutoencoderKL":
        return (raw - config.shift_factor) * config.scaling_factor
    if class_name == "AutoencoderKLWan":
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return (raw - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    if class_name == "AutoencoderKLLTXVideo":
        mean, std = vae.latents_mean.view(-1, 1, 1, 1), vae.latents_std.view(-1, 1, 1, 1)
        return (raw - mean) * config.scaling_factor / std
    return raw * config.scaling_factor


@pytest.mark.parametrize("class_name", TINY)
def test_vae_finish_normalizes_by_the_documented_rule_and_decode_undoes_it(
    class_name: str, load: Load, folders: dict[str, Path]
) -> None:
    encoder, pixels = load(class_name), _pixels(class_name, batch=1)
    vae = getattr(diffusers, class_name).from_pretrained(folders[class_name]).eval()
    stats = encoder.encode(pixels)
    latents = encoder.finish(stats)
    torch.testing.assert_close(latents, _documented(class_name, vae, stats.mean_BCTHW))
    raw = stats.mean_BCTHW
    if class_name in IMAGE_CLASSES:
        raw = raw.transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        own = _clips(vae.decode(raw).sample, pixels).clamp(-1, 1)
    torch.testing.assert_close(encoder.decode(latents), own, atol=1e-4, rtol=1e-4)


def test_vae_normalization_with_vectors_in_an_image_class(tmp_path: Path, load: Load) -> None:
    vectors = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    vae = diffusers.AutoencoderKL(**(TINY["AutoencoderKL"][0] | vectors))
    vae.save_pretrained(tmp_path)
    encoder = load("AutoencoderKL", path=str(tmp_path))
    assert encoder.provenance["latent_mean"] == [1.0, 2.0, 3.0, 4.0]
    assert encoder.provenance["latent_scale"] == [0.8, 0.4, 0.2, 0.1]


def test_vae_finish_draws_from_the_posterior(load: Load) -> None:
    encoder = load("AutoencoderKL")
    stats = encoder.encode(_pixels("AutoencoderKL", batch=1))
    noise = torch.randn(
        4000, *stats.mean_BCTHW.shape[1:], generator=torch.Generator().manual_seed(0)
    )
    latents = encoder.finish(stats, noise)
    mean = (stats.mean_BCTHW - 0.1) * 0.4
    std = torch.exp(0.5 * stats.logvar_BCTHW) * 0.4
    error_of_the_mean = (latents.mean(0, keepdim=True) - mean) / std
    assert float(error_of_the_mean.abs().max()) < 6 / 4000**0.5
    torch.testing.assert_close(latents.std(0, keepdim=True), std, rtol=0.08, atol=0)
    assert torch.equal(encoder.finish(stats, noise[:1]), encoder.finish(stats, noise)[:1])


@pytest.mark.parametrize("class_name", TINY)
def test_vae_in_slices_equals_the_whole(class_name: str, load: Load) -> None:
    pixels = _pixels(class_name)
    whole = load(class_name, frames_per_call=100)
    slices = load(class_name, frames_per_call=2)
    latents = whole.finish(whole.encode(pixels))
    torch.testing.assert_close(slices.finish(slices.encode(pixels)), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slices.decode(latents), whole.decode(latents), atol=1e-5, rtol=1e-4)


def test_vae_slices_hold_at_most_the_frames_asked_for(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encoder = load("AutoencoderKL", frames_per_call=4)
    original = encoder._moments
    monkeypatch.setattr(encoder, "_moments", lambda x: calls.append(len(x)) or original(x))
    encoder.encode(_pixels("AutoencoderKL"))
    assert calls == [3, 3], "equally many each time"
    monkeypatch.setattr(encoder, "_frames_per_call", 0)
    monkeypatch.setattr("longtake.encoders.diffusers_vae._PIXELS_PER_CALL", 3 * 32 * 64 + 1)
    calls.clear()
    encoder.encode(_pixels("AutoencoderKL"))
    assert calls == [3, 3]
    calls.clear()
    odd = encoder.encode(_pixels("AutoencoderKL", batch=3)[:, :, :1])
    assert calls == [3]
    monkeypatch.setattr(encoder, "_frames_per_call", 2)
    calls.clear()
    filled_up = encoder.encode(_pixels("AutoencoderKL", batch=3)[:, :, :1])
    assert calls == [2, 2], "the last slice is filled up"
    torch.testing.assert_close(filled_up.mean_BCTHW, odd.mean_BCTHW)


@pytest.mark.parametrize(
    ("class_name", "shape"),
    [("AutoencoderKL", (3, 32, 64)), ("AutoencoderKLWan", (3, 5, 32, 64))],
)
def test_vae_slices_follow_from_what_one_and_two_items_took(
    class_name: str, shape: tuple[int, ...], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU there is no peak to read; on a GPU tests/encoders/test_memory.py has the real one.
    sizes: list[int] = []

    def peak(call: Callable[[], Tensor], device: torch.device) -> int:
        sizes.append(len(call()))
        return sizes[-1] * 300 * 2**20

    monkeypatch.setattr("longtake.encoders.diffusers_vae.peak_bytes", peak)
    encoder, graphs = load(class_name), []
    if encoder.network is not None:
        compile_blocks([encoder.network], backend=lambda graph, _: graphs.append(1) or graph)
    item = torch.zeros(1, *shape, dtype=torch.uint8)
    assert encoder._measure(item, item[0, 0].numel()) == 13, "of 4 GiB"
    assert sizes == [1, 2]
    assert not graphs, "measured eagerly: two shapes of no use are not compiled"
    assert encoder._measure(item, 2**23) == 2, "kernels index no more"


@pytest.mark.parametrize("class_name", TINY)
def test_vae_takes_bytes_as_they_come_from_the_loader(class_name: str, load: Load) -> None:
    encoder = load(class_name)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(
        0, 256, _pixels(class_name).shape, dtype=torch.uint8, generator=generator
    )
    of_bytes = encoder.encode(pixels)
    of_floats = encoder.encode(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(of_bytes.mean_BCTHW, of_floats.mean_BCTHW)


@pytest.mark.parametrize("class_name", IMAGE_CLASSES)
def test_vae_with_channels_last_has_the_same_numbers(class_name: str, load: Load) -> None:
    encoder, pixels = load(class_name), _pixels(class_name)
    stats = encoder.encode(pixels)
    encoder.set_channels_last()
    seen = []
    convolution = next(m for m in encoder.network.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride(1)))
    torch.testing.assert_close(encoder.encode(pixels).mean_BCTHW, stats.mean_BCTHW)
    assert seen == [1], "channels are neighbours"


@pytest.mark.parametrize(
    ("class_name", "tile", "size"),
    [
        ("AutoencoderKL", 32, (48, 72)),
        ("AutoencoderDC", 32, (48, 72)),
        ("AutoencoderKLWan", 64, (64, 104)),
        ("AutoencoderKLHunyuanVideo", 64, (64, 104)),
        ("AutoencoderKLCogVideoX", 64, (64, 104)),
        ("AutoencoderKLLTXVideo", 128, (128, 160)),
    ],
)
def test_vae_tiles_are_crops_and_come_close_to_the_whole(
    class_name: str, tile: int, size: tuple[int, int], load: Load
) -> None:
    pixels = _pixels(class_name, batch=1, height=size[0], width=size[1])
    whole, tiled = load(class_name), load(class_name, tile=tile)
    latents, tiled_latents = (e.finish(e.encode(pixels)) for e in (whole, tiled))
    assert tiled_latents.shape == latents.shape
    images, tiled_images = whole.decode(latents), tiled.decode(latents)
    assert tiled_images.shape == images.shape == pixels.shape
    # The first three quarters of the first tile have no neighbour to blend with.
    spatial = whole.downsample[1]
    kept, kept_pixels = slice(tile * 3 // 4 // spatial), slice(tile * 3 // 4)
    crop_latents = whole.finish(whole.encode(pixels[..., :tile, :tile]))
    torch.testing.assert_close(
        tiled_latents[..., kept, kept], crop_latents[..., kept, kept], atol=1e-5, rtol=1e-4
    )
    crop_images = whole.decode(latents[..., : tile // spatial, : tile // spatial])
    torch.testing.assert_close(
        tiled_images[..., kept_pixels, kept_pixels],
        crop_images[..., kept_pixels, kept_pixels],
        atol=1e-5,
        rtol=1e-4,
    )
    # Normalization and attention of a random model see other statistics in a tile.
    assert _relative_error(tiled_latents, latents) < 0.5


def _relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("class_name", CLIP_CLASSES)
def test_vae_refuses_clip_lengths_it_would_cut_and_names_the_nearest(
    class_name: str, load: Load
) -> None:
    encoder = load(class_name)
    step = encoder.downsample[0] * AUTOENCODERS[class_name].clip_steps
    message = (
        f"num_frames={step} does not suit {class_name}, .* 1 .* {step}k frames: use 1 or {step + 1}"
    )
    with pytest.raises(ValueError, match=message):
        encoder.encode(torch.zeros(1, 3, step, 32, 32))


def test_vae_refuses_sizes_off_its_grid(load: Load) -> None:
    with pytest.raises(ValueError, match=r"width=60 must be a multiple of 8 for .*Wan: use 64"):
        load("AutoencoderKLWan").encode(torch.zeros(1, 3, 5, 64, 60))
    with pytest.raises(ValueError, match=r"tile=40 must be a multiple of 32 .*Wan: use 32"):
        load("AutoencoderKLWan", tile=40)
    with pytest.raises(ValueError, match="AutoencoderTiny cannot work in tiles"):
        load("AutoencoderTiny", tile=64)
    with pytest.raises(ValueError, match="frames_per_call=-1 must be positive"):
        load("AutoencoderKL", frames_per_call=-1)
    with pytest.raises(ValueError, match="memory_gib=0 must be above 0"):
        load("AutoencoderKL", memory_gib=0.0)


def test_vae_fp16_is_refused_where_it_overflows(load: Load, tmp_path: Path) -> None:
    for class_name in ("AutoencoderKL", "AutoencoderKLWan"):
        with pytest.raises(ValueError, match=f"{class_name} overflows in fp16 .* use dtype bf16"):
            load(class_name, dtype="fp16")
    repaired = diffusers.AutoencoderKL(**TINY["AutoencoderKL"][0], force_upcast=False)
    repaired.save_pretrained(tmp_path)
    encoder = load("AutoencoderKL", path=str(tmp_path), dtype="fp16")
    assert encoder.provenance["dtype"] == "float16"


def test_vae_in_bf16_keeps_statistics_in_bf16_and_finishes_in_fp32(load: Load) -> None:
    encoder, pixels = load("AutoencoderKL", dtype="bf16"), _pixels("AutoencoderKL")
    stats = encoder.encode(pixels)
    assert stats.mean_BCTHW.dtype == torch.bfloat16
    latents = encoder.finish(stats, torch.zeros_like(stats.mean_BCTHW))
    assert latents.dtype == torch.float32
    reference = load("AutoencoderKL")
    assert _relative_error(latents, reference.finish(reference.encode(pixels))) < 0.03


@pytest.mark.parametrize("class_name", TINY)
def test_vae_says_without_its_weights_how_it_finishes(load: Load, class_name: str) -> None:
    encoder = load(class_name)
    stats = encoder.encode(_pixels(class_name))
    noise = torch.randn(stats.mean_BCTHW.shape)
    mean, scale = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (encoder.latent_mean, encoder.latent_scale)
    )
    sample = sample_posterior(stats, noise)
    assert torch.equal(encoder.finish(stats, noise), (sample - mean) * scale)


def test_vae_digest_is_that_of_the_weights_not_of_their_precision(load: Load) -> None:
    digests = {
        dtype: load("AutoencoderKL", dtype=dtype).provenance["weights_sample_sha256"]
        for dtype in ("fp32", "bf16")
    }
    assert digests["fp32"] == digests["bf16"]


def test_vae_random_weights_are_a_function_of_the_seed(folders: dict[str, Path]) -> None:
    def digest(path: str, seed: int) -> object:
        config = VideoEncoderConfig(kind="diffusers", path=path, weights="random")
        state = torch.get_rng_state()
        encoder = build_video_encoder(config, "cpu", seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert encoder.provenance["weights"] == "random"
        return encoder.provenance["weights_sample_sha256"]

    path = str(folders["AutoencoderKL"])
    assert digest(path, 0) == digest(path, 0) != digest(path, 1)


def test_vae_of_a_public_name_is_built_off_line() -> None:
    encoder = build_video_encoder(VideoEncoderConfig(kind="diffusers", weights="random"), "cpu", 0)
    assert encoder.provenance["source"] == "stabilityai/sd-vae-ft-ema"
    assert encoder.provenance["latent_scale"] == [0.18215] * 4
    assert encoder.latent_shape(16, 256, 256) == (4, 16, 32, 32)
    # The published parameter count of Stable Diffusion's autoencoder.
    assert sum(p.numel() for p in encoder._vae.parameters()) == 83_653_863


def test_vae_subfolder_of_a_pipeline(folders: dict[str, Path], load: Load) -> None:
    parent = str(folders["AutoencoderKL"].parent)
    encoder = load("AutoencoderKL", path=parent, subfolder="vae")
    assert encoder.provenance["source"] == str(folders["AutoencoderKL"])
    with pytest.raises(ValueError, match=r"has no config.json: .* the subfolder"):
        load("AutoencoderKL", path=parent)


def test_vae_sources_that_cannot_be_used_say_what_to_do(
    folders: dict[str, Path], load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"'/no/such' does not exist: .*--encoder-weights random"):
        load("AutoencoderKL", path="/no/such")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load AutoencoderKL .*--encoder-weights random"):
        load("AutoencoderKL", path="nobody/nothing")
    with pytest.raises(ValueError, match=r"no config of AutoencoderKL .*sd-vae-ft-ema"):
        load("AutoencoderKL", path="nobody/nothing", weights="random")
    with pytest.raises(ValueError, match=r"no known rule .* use one of AutoencoderKL, "):
        build_video_encoder(VideoEncoderConfig(kind="diffusers", class_name="VQModel"), "cpu")
    with pytest.raises(ValueError, match="class AutoencoderKLWan, not AutoencoderKL: set"):
        load("AutoencoderKL", path=str(folders["AutoencoderKLWan"]))
    config = (folders["AutoencoderKL"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"must hold config.json and complete weights"):
        load("AutoencoderKL", path=str(tmp_path))
    weights = (folders["AutoencoderKL"] / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="cannot load AutoencoderKL from"):
        load("AutoencoderKL", path=str(tmp_path))
