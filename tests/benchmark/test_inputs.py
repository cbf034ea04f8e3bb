import torch

from longtake.benchmark.inputs import latent_shape, random_batches, random_inputs
from longtake.benchmark.subject import Subject
from longtake.config import preset, work_of_latents
from longtake.encoders import build_video_encoder
from longtake.models import build_model_from_config
from longtake.parallel import build_mesh, local_part, read_full, start_distributed
from tests.benchmark.conftest import tiny_row
from tests.processes import run_in_processes


def test_latents_have_the_shape_that_the_encoder_gives():
    config = preset("stdit-xl2-64x512")
    assert latent_shape(config, config.data.buckets[0]) == (4, 64, 64, 64)
    config = preset("stdit-xl2-1min-1080p")
    assert latent_shape(config, config.data.buckets[0]) == (16, 360, 135, 240)
    assert work_of_latents(config, (360, 135, 240), samples=1)["tokens"] == 2_937_600
    config = preset("quickstart")
    bucket = config.data.buckets[0]
    encoder = build_video_encoder(config.video_encoder, "cpu")
    expected = encoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    assert latent_shape(config, bucket) == expected


def test_inputs_are_random_and_differ_from_turn_to_turn(mesh):
    config = tiny_row("stdit-16x256").config
    model = build_model_from_config(config.model)
    bucket = config.data.buckets[0]
    latents = latent_shape(config, bucket)

    def make(seed):
        options = {"micro_batch": 3, "mesh": mesh, "seed": seed}
        return random_inputs(config, model, bucket, latents, **options)

    turns = make(0)
    first = turns[0]
    assert first.clean_BCTHW.shape == (3, *latents)
    assert abs(first.clean_BCTHW.std() - 1) < 0.1
    embeds_BLK = first.condition["prompt_embeds_BLK"]
    assert embeds_BLK.shape == (3, config.model.max_caption_tokens, config.model.caption_channels)
    assert embeds_BLK.any(dim=-1).all()
    assert first.condition["prompt_mask_BL"].all()
    ids = torch.cat([inputs.keys.sample_ids_B for inputs in turns])
    assert len(ids.unique()) == len(ids)
    assert torch.equal(make(0)[0].clean_BCTHW, first.clean_BCTHW)
    assert not torch.equal(make(1)[0].clean_BCTHW, first.clean_BCTHW)


def test_batches_are_noise_with_captions_that_fill_the_encoder(mesh):
    config = tiny_row("stdit-16x256-on-line").config
    bucket = config.data.buckets[0]
    batches = random_batches(config, bucket, 0, micro_batch=2, mesh=mesh, seed=0)
    pixels = batches[0].pixels_BCTHW
    assert pixels.shape == (2, 3, bucket.num_frames, bucket.height, bucket.width)
    assert pixels.float().std() > 60
    assert all(len(text.split()) == config.text_encoder.max_tokens for text in batches[0].captions)
    assert not torch.equal(batches[0].sample_ids_B, batches[1].sample_ids_B)


def test_no_weight_is_left_at_zero(mesh):
    # Zeros would make the backward of the first steps faster than that of later ones.
    subject = Subject(tiny_row("stdit-16x256").config, mesh, encoders="absent", seed=0)
    for name, param in subject.model.named_parameters():
        assert local_part(param).any(), name


def _weights():
    config = tiny_row("stdit-16x256").config
    mesh = build_mesh(config.parallel, start_distributed("cpu"))
    model = Subject(config, mesh, encoders="absent", seed=0).model
    return {name: read_full(param) for name, param in model.named_parameters()}


def test_weights_do_not_depend_on_how_they_are_spread():
    (alone,) = run_in_processes(_weights, 1)
    for found in run_in_processes(_weights, 2):
        assert found.keys() == alone.keys()
        for name, weight in alone.items():
            assert torch.equal(found[name], weight), name
