"""Encoding shared by a group of processes: the numbers of one process, and each part once."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from longtake.data import BadSample, Batch, Samples
from longtake.encoders import (
    TextEncoderConfig,
    VideoEncoderConfig,
    build_text_encoder,
    build_video_encoder,
)
from longtake.parallel import ParallelConfig, build_mesh, start_distributed
from longtake.pipeline import (
    SharedEncoding,
    build_encoders,
    encode_batch,
    in_turn,
    share_encoding,
)
from longtake.store import EncodedBatch
from tests.processes import run_in_processes

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
T5 = TextEncoderConfig(kind="t5", path="tiny", weights="random", max_tokens=24, num_lengths=3)
CAPTIONS = ["a b c", "", "d e f g h i j k l m", "a b c", "n"]


def _save(folder, class_name, **settings):
    getattr(diffusers, class_name)(**settings).save_config(folder)
    return VideoEncoderConfig(
        kind="diffusers", class_name=class_name, path=str(folder), weights="random"
    )


@pytest.fixture(scope="module")
def by_frame(tmp_path_factory):
    return _save(
        tmp_path_factory.mktemp("frames"),
        "AutoencoderKL",
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )


@pytest.fixture(scope="module")
def by_clip(tmp_path_factory):
    return _save(
        tmp_path_factory.mktemp("clips"),
        "AutoencoderKLWan",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 2.0, 1.5, 1.0],
    )


def _batch(samples, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 3, frames, 16, 16)
    return Batch(
        pixels_BCTHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        captions=CAPTIONS[:samples],
        labels_B=torch.zeros(samples, dtype=torch.int64),
        epochs_B=torch.zeros(samples, dtype=torch.int64),
        sample_ids_B=torch.arange(samples),
        weights_B=torch.ones(samples),
        bucket=0,
    )


def _inputs(video, text, sizes, *, ahead, shared):
    """Latents and condition of one batch of each size."""

    def encode(number):
        inputs = encode_batch(
            _batch(*sizes[number], number),
            video_encoder=video,
            text_encoder=text,
            seed=0,
            device=CPU,
            shared=shared,
        )
        return inputs.clean_BCTHW, inputs.condition

    return list(in_turn(encode, range(len(sizes)), device=CPU, ahead=ahead))


def _together(video_config, text_config, sizes):
    """Inputs in turn and ahead, and what this process's encoders were given each time."""
    mesh = build_mesh(ParallelConfig(sp=2), start_distributed("cpu"))
    video, text = build_encoders(video_config, text_config, mesh, 0)
    given = []
    encode_video, encode_text = video.encode, text.encode

    def note_video(pixels_BCTHW):
        given.append(tuple(pixels_BCTHW.shape[:3:2]))
        return encode_video(pixels_BCTHW)

    def note_text(captions):
        given.append(len(captions))
        return encode_text(captions)

    video.encode, text.encode = note_video, note_text
    shared = share_encoding(mesh)
    assert shared.group is not None
    assert shared.group.name != mesh.token_group.name
    in_order = [_inputs(video, text, sizes, ahead=ahead, shared=shared) for ahead in (False, True)]
    return in_order, given


# Samples and frames; what each process of two encodes: (clips, frames of each), then captions.
@pytest.mark.parametrize(
    ("kind", "placement", "sizes", "parts"),
    [
        ("by_frame", "sharded", [(1, 4), (3, 3), (5, 1)], [(2, 1), 1, (5, 1), 2, (3, 1), 3]),
        ("by_clip", "replicated", [(1, 5), (3, 5)], [(1, 5), 1, (2, 5), 2]),
    ],
)
def test_a_group_has_the_inputs_of_one_process(request, kind, placement, sizes, parts):
    config = request.getfixturevalue(kind)
    video, text = build_video_encoder(config, CPU, 0), build_text_encoder(T5, CPU, 0)
    expected = _inputs(video, text, sizes, ahead=False, shared=SharedEncoding())
    arguments = (config, replace(T5, placement=placement), sizes)
    for in_order, given in run_in_processes(_together, 2, *arguments, timeout_seconds=200):
        assert given == parts * 2
        for made in in_order:
            for (clean, condition), (own_clean, own) in zip(made, expected, strict=True):
                torch.testing.assert_close(clean, own_clean, atol=1e-5, rtol=1e-5)
                assert condition.keys() == own.keys()
                for name, value in condition.items():
                    torch.testing.assert_close(value, own[name], atol=1e-5, rtol=1e-5)


def _partly_stored(lacks, replaced=()):
    """Four clips of two frames and their captions, of which a store lacks some rows; and which
    samples were replaced because they could not be read."""
    whole = _batch(4, 2, 0)
    rows_P = torch.tensor(lacks, dtype=torch.int64)
    samples = {f.name: getattr(whole, f.name) for f in fields(Samples)}
    samples["bad"] = [BadSample(sample, "x.mp4", 2, "unreadable", "lost") for sample in replaced]
    return EncodedBatch(
        **samples,
        mean_BCTHW=torch.ones(4, 4, 2, 8, 8),
        logvar_BCTHW=torch.zeros(4, 4, 2, 8, 8),
        embeds_BLK=torch.ones(4, 3, T5.channels),
        mask_BL=torch.ones(4, 3, dtype=torch.bool),
        pixel_size=(16, 16),
        pixels_PCTHW=whole.pixels_BCTHW[rows_P] if lacks else None,
        pixel_rows_P=rows_P if lacks else None,
        text_rows_P=rows_P if lacks else None,
        missing_captions=[CAPTIONS[row] for row in lacks],
        is_partial=True,
    )


def _of_a_store(video_config, batches):
    """Inputs of each process's own batches, and how many frames and captions it encoded."""
    mesh = build_mesh(ParallelConfig(sp=2), start_distributed("cpu"))
    video, text = build_encoders(video_config, replace(T5, placement="replicated"), mesh, 0)
    shared = share_encoding(mesh)
    found = []
    for batch in batches[mesh.rank]:
        given = []

        def note(x, *, encode, given=given):
            given.append(x.shape[0] * x.shape[2] if isinstance(x, torch.Tensor) else len(x))
            return encode(x)

        with pytest.MonkeyPatch.context() as patch:
            for encoder in (video, text):
                patch.setattr(encoder, "encode", partial(note, encode=encoder.encode))
            inputs = encode_batch(
                batch, video_encoder=video, text_encoder=text, seed=0, device=CPU, shared=shared
            )
        found.append((inputs.clean_BCTHW, inputs.condition["prompt_embeds_BLK"], given))
    return found


def test_what_a_store_lacks_is_shared_if_it_is_the_same_for_all(by_frame):
    same = [_partly_stored([1, 2, 3])] * 2
    # The second process could not read clip 1, and has one that the store holds in its place.
    different = [_partly_stored([1, 2]), _partly_stored([2], replaced=[1])]
    none = [_partly_stored([0]), _partly_stored([], replaced=[0])]
    # Both lack as much, but one of them for another clip with the same caption.
    other = [_partly_stored([3]), _partly_stored([3], replaced=[3])]
    batches = [list(own) for own in zip(same, different, none, other, strict=True)]
    counts = {
        0: [[3, 2], [4, 2], [2, 1], [2, 1]],  # frames, captions
        1: [[3, 2], [2, 1], [], [2, 1]],
    }
    video, text = build_video_encoder(by_frame, CPU, 0), build_text_encoder(T5, CPU, 0)
    both = run_in_processes(_of_a_store, 2, by_frame, batches, timeout_seconds=200)
    for rank, found in enumerate(both):
        assert [given for *_, given in found] == counts[rank]
        for batch, (clean, embeds, _) in zip(batches[rank], found, strict=True):
            alone = encode_batch(batch, video_encoder=video, text_encoder=text, seed=0, device=CPU)
            torch.testing.assert_close(clean, alone.clean_BCTHW, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(embeds, alone.condition["prompt_embeds_BLK"])
