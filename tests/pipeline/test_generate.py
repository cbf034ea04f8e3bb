import pytest
import torch

from longtake.diffusion import DiffusionConfig, SamplerConfig, build_objective
from longtake.models import build_model
from longtake.pipeline import Request, generate
from tests.pipeline.conftest import SMALL, awake

SIZE = {"num_frames": 2, "height": 16, "width": 24}
EULER = SamplerConfig(name="euler", steps=2, guidance_scale=2.0)


@pytest.fixture
def draw(model, objective, video_encoder, text_encoder):
    def draw(*prompts, seed=0, sampler=EULER, **size):
        request = Request(prompts=prompts, seed=seed, **(SIZE | size))
        return generate(
            model,
            objective,
            request,
            sampler,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
            device=torch.device("cpu"),
        )

    return draw


def test_video_is_a_function_of_seed_place_and_prompt(draw):
    videos = draw("a", "b")
    assert videos.dtype == torch.uint8
    assert videos.shape == (2, 3, 2, 16, 24)
    assert torch.equal(draw("a")[0], videos[0])
    assert torch.equal(draw("c", "b")[1], videos[1])
    assert not torch.equal(draw("b")[0], videos[1])
    assert not torch.equal(draw("c")[0], videos[0])
    assert not torch.equal(draw("a", seed=1)[0], videos[0])


def test_guidance_changes_the_video_and_one_turns_it_off(draw):
    plain = draw("a", sampler=SamplerConfig(name="euler", steps=2, guidance_scale=1.0))
    few = SamplerConfig(name="euler", steps=2, guidance_scale=4.0, guidance_channels=3)
    strong = SamplerConfig(name="euler", steps=2, guidance_scale=4.0)
    assert not torch.equal(draw("a", sampler=strong), plain)
    assert not torch.equal(draw("a", sampler=few), draw("a", sampler=strong))


def test_images_are_videos_of_one_frame(draw):
    assert draw("a", num_frames=1, height=24, width=8).shape == (1, 3, 1, 24, 8)


def test_labels_and_fresh_noise_of_each_step(video_encoder):
    model = awake(build_model("dit", "tiny", **(SMALL | {"learn_sigma": True}), num_classes=5))

    def draw(*labels):
        return generate(
            model,
            build_objective(DiffusionConfig()),
            Request(labels=labels, **SIZE),
            SamplerConfig(name="ddpm", steps=3, guidance_scale=2.0),
            video_encoder=video_encoder,
            text_encoder=None,
            device=torch.device("cpu"),
        )

    both = draw(1, 4)
    assert torch.equal(draw(1)[0], both[0])
    assert not torch.equal(draw(2)[0], both[0])


def test_captions_name_labels():
    assert Request(labels=(3, 1), **SIZE).captions == ("label 3", "label 1")
    assert Request(prompts=("x",), **SIZE).captions == ("x",)
    assert len(Request(**SIZE)) == 0
