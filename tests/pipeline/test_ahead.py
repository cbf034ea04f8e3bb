"""Encoding ahead: the order of events, what counts as consumed, and errors in their turn."""

from functools import partial
from itertools import islice

import pytest
import torch

from longtake.data import Bucket, DataConfig, TooManyBadSamples, build_loader
from longtake.diffusion import DiffusionConfig, build_objective
from longtake.encoders.dct import DctEncoder
from longtake.encoders.hashed_words import HashedWordsEncoder
from longtake.models import build_model, init_weights
from longtake.pipeline import encode_batch, encoded_steps, in_turn, training_loss
from tests.programs.runs import SIDE, make_clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


def _loader(manifest, *, micro_batches=2, start=None, **settings):
    bucket = {"height": SIDE, "width": SIDE, "batch_size": 4}
    config = DataConfig(
        manifest=str(manifest),
        buckets=(Bucket(num_frames=4, **bucket), Bucket(num_frames=2, **bucket)),
        num_workers=0,
        **settings,
    )
    return build_loader(config, seed=0, micro_batches=micro_batches, start=start)


def _encode(**settings):
    return partial(
        encode_batch,
        video_encoder=DctEncoder(),
        text_encoder=HashedWordsEncoder(channels=16, max_tokens=6),
        seed=0,
        device=CPU,
        **settings,
    )


def test_each_is_begun_before_the_one_before_it_is_handed_out():
    events = []

    def make(number):
        events.append(f"make {number}")
        return 10 * number

    for value in in_turn(make, range(3), device=CPU, ahead=True):
        events.append(f"use {value}")
    assert events == ["make 0", "make 1", "use 0", "make 2", "use 10", "use 20"]
    events.clear()
    for value in in_turn(make, range(3), device=CPU, ahead=False):
        events.append(f"use {value}")
    assert events == ["make 0", "use 0", "make 1", "use 10", "make 2", "use 20"]
    assert list(in_turn(make, [], device=CPU, ahead=True)) == []


@pytest.mark.parametrize("ahead", [False, True], ids=["serial", "ahead"])
def test_an_error_is_raised_in_its_turn_with_its_cause(ahead):
    used = []

    def make(number):
        try:
            return 1 // (2 - number)
        except ZeroDivisionError as error:
            raise ValueError(f"cannot encode batch {number}") from error

    with pytest.raises(ValueError, match="cannot encode batch 2") as caught:
        used.extend(in_turn(make, range(9), device=CPU, ahead=ahead))
    assert used == [0, 1]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert any(entry.name == "make" for entry in caught.traceback)


@pytest.mark.parametrize("ahead", [False, True], ids=["serial", "ahead"])
def test_the_place_is_that_of_the_step_handed_out(manifest, ahead):
    loader, reference, expected = _loader(manifest), _loader(manifest), []
    for micro_batches in islice(reference, 9):
        ids = [batch.sample_ids_B.tolist() for batch in micro_batches]
        expected.append((reference.state, micro_batches[0].bucket, ids))
    seen = []
    for step in encoded_steps(loader, _encode(), num_steps=9, device=CPU, ahead=ahead):
        assert step.num_micro_batches == 2
        ids = [inputs.keys.sample_ids_B.tolist() for inputs in step.micro_batches]
        seen.append((step.place, step.bucket, ids))
    assert seen == expected
    assert loader.state.step == 9, "never asked for more than is trained"
    assert {bucket for _, bucket, _ in seen} == {0, 1}


def test_going_on_from_a_place_repeats_and_skips_nothing(manifest):
    def sample_ids(start, num_steps):
        loader = _loader(manifest, start=start)
        found = []
        for step in encoded_steps(loader, _encode(), num_steps=num_steps, device=CPU, ahead=True):
            found += [inputs.keys.sample_ids_B.tolist() for inputs in step.micro_batches]
            yield step.place, found

    *_, (_, straight) = sample_ids(None, 6)
    stopped = sample_ids(None, 6)
    for _ in range(3):
        place, first = next(stopped)  # the fourth step is begun, and then given up
    stopped.close()
    *_, (_, second) = sample_ids(place, 3)
    assert first + second == straight


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_losses_and_gradients_are_those_of_the_serial_path(manifest, micro_batches):
    objective = build_objective(DiffusionConfig(objective="flow"))

    def train(ahead):
        model = build_model(
            *("stdit", "tiny"),
            **{"depth": 1, "hidden_size": 48, "num_heads": 2, "in_channels": 24},
            **{"learn_sigma": False, "caption_channels": 16, "max_caption_tokens": 6},
        )
        init_weights(model, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        steps = encoded_steps(
            _loader(manifest, micro_batches=micro_batches),
            _encode(),
            num_steps=4,
            device=CPU,
            ahead=ahead,
        )
        for step in steps:
            for inputs in step.micro_batches:
                loss = training_loss(model, objective, inputs, condition_dropout=0.1).mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses, [param.detach().clone() for param in model.parameters()]

    serial, overlapped = train(False), train(True)
    assert len(serial[0]) == 4 * micro_batches
    assert serial[0] == overlapped[0]
    assert all(map(torch.equal, serial[1], overlapped[1]))


@pytest.mark.parametrize("ahead", [False, True], ids=["serial", "ahead"])
def test_bad_samples_count_with_the_step_that_met_them(tmp_path, ahead):
    manifest = make_clips(tmp_path)
    (tmp_path / "clip1.mp4").write_bytes(b"not a video")
    (tmp_path / "clip2.mp4").write_bytes(b"not a video")
    settings = {"max_bad_fraction": 0.5, "bad_grace": 9}
    counts, expected, serial = [], [], _loader(manifest, **settings)

    def count():
        loader = _loader(manifest, **settings)
        for step in encoded_steps(loader, _encode(), num_steps=50, device=CPU, ahead=ahead):
            yield step.place.step, len(step.bad)
            assert len(list(step.micro_batches)) == 2

    with pytest.raises(TooManyBadSamples, match="samples read could not be used"):
        counts.extend(count())
    with pytest.raises(TooManyBadSamples):
        expected.extend((serial.state.step, len(serial.bad)) for _ in serial)
    assert counts == expected
    assert counts
