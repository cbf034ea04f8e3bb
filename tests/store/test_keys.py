"""Content addresses: what makes another entry, what does not, and how files are recognized."""

import dataclasses
import os

import numpy as np
import pytest

from longtake.data import Bucket, DataConfig, read_manifest
from longtake.encoders import TextEncoderConfig, VideoEncoderConfig
from longtake.encoders.dct import DctEncoder
from longtake.encoders.hashed_words import HashedWordsEncoder
from longtake.store.keys import clip_keys, file_keys, text_key
from longtake.store.recipe import Recipe, StoreError, check_data, make_recipe
from tests.programs.runs import write_manifest

DATA = DataConfig(buckets=(Bucket(num_frames=4, height=32, width=32),))


def _recipe(data=DATA, *, latents="bf16", max_tokens=8, provenance=(), **encoder):
    video = DctEncoder(**encoder)
    video.provenance |= dict(provenance)
    return make_recipe(
        data,
        video_config=VideoEncoderConfig(),
        video_encoder=video,
        text_config=TextEncoderConfig(),
        text_encoder=HashedWordsEncoder(max_tokens=max_tokens),
        latents=latents,
    )


def _key(recipe, *, file=b"f" * 16, start=0.0, end=None):
    return clip_keys(recipe, recipe.clip_digest(0), file, start, end)[:16]


def test_whatever_changes_the_numbers_changes_the_key():
    base = _recipe()
    keys = [
        _key(base),
        _key(base, file=b"g" * 16),
        _key(base, start=0.5),
        _key(base, end=2.0),
        _key(_recipe(dataclasses.replace(DATA, fps=8.0))),
        _key(_recipe(dataclasses.replace(DATA, frame_interval=2))),
        _key(
            _recipe(dataclasses.replace(DATA, buckets=(Bucket(num_frames=5, height=32, width=32),)))
        ),
        _key(_recipe(latents="8bit")),
        _key(_recipe(block=4)),
        _key(_recipe(provenance={"weights_sample_sha256": "others"})),
        _key(_recipe(provenance={"dtype": "bfloat16"})),
    ]
    assert len(set(keys)) == len(keys)
    words = _recipe().text_digest()
    assert text_key(words, "a") != text_key(words, "b")
    assert text_key(words, "a") != text_key(_recipe(max_tokens=9).text_digest(), "a")


def test_what_changes_no_number_changes_no_key():
    others = {
        "library": "diffusers 9",
        "source": "/elsewhere",
        "revision": "main",
        "latent_scale": [2.0],
    }
    for recipe in (
        _recipe(provenance=others),
        _recipe(whitening=0.5),  # is undone by `finish`
        _recipe(dataclasses.replace(DATA, num_workers=9, clip_position="start")),
        _recipe(dataclasses.replace(DATA, flip=True, clip_places=3)),
    ):
        assert _key(recipe) == _key(_recipe())


def test_a_sample_has_a_key_for_each_place_and_side():
    recipe = _recipe(dataclasses.replace(DATA, flip=True, clip_places=3))
    keys = clip_keys(recipe, recipe.clip_digest(0), b"f" * 16, 0.0, None)
    variants = [keys[k : k + 16] for k in range(0, len(keys), 16)]
    assert len(set(variants)) == recipe.num_variants == 6
    assert [recipe.variant(place, flip) for place in range(3) for flip in (False, True)] == list(
        range(6)
    )
    assert _recipe(dataclasses.replace(DATA, clip_position="start", clip_places=3)).places == 1


def test_a_recipe_survives_json_and_nothing_else_passes_for_one():
    recipe = _recipe(dataclasses.replace(DATA, fps=8.0, flip=True))
    plain = recipe.to_json()
    again = Recipe.from_json(plain)
    assert again.clip_digest(0) == recipe.clip_digest(0)
    assert again.to_json() == plain
    facts = plain["video"]["facts"]
    for change in (
        {"places": 0},
        {"places": 1.5},
        {"flips": 1},
        {"latents": "4bit"},
        {"buckets": [[4, 32]]},
        {"buckets": []},
        {"latent_shapes": [[24, 4, 4, -4]]},
        {"video": None},
        {"video": {"config": {}}},
        {"video": {**plain["video"], "facts": {}}},
        {"video": {**plain["video"], "config": 3}},
        {"video": {**plain["video"], "facts": {**facts, "latent_mean": [0.0]}}},
        {
            "video": {
                **plain["video"],
                "facts": {**facts, "downsample": [0, 8, 8]},
            }
        },
        {"text": {**plain["text"], "facts": {"channels": 0, "max_tokens": 8}}},
        {"unknown": 1},
    ):
        with pytest.raises(StoreError, match="not a recipe"):
            Recipe.from_json({**plain, **change})
    for value in (None, [], {}, {"video": 3}):
        with pytest.raises(StoreError, match="not a recipe"):
            Recipe.from_json(value)


def test_settings_that_a_store_cannot_serve_are_named():
    with pytest.raises(ValueError, match=r"crop=random .* --data.crop center"):
        _recipe(dataclasses.replace(DATA, crop="random"))
    recipe = _recipe(dataclasses.replace(DATA, clip_places=2))
    check_data(recipe, dataclasses.replace(DATA, clip_places=2), "S")
    check_data(recipe, DATA, "S")
    check_data(recipe, dataclasses.replace(DATA, clip_position="start", clip_places=5), "S")
    for change, problem in (
        ({"fps": 4.0}, r"data.fps=4.0, but the latent store S was encoded with None"),
        ({"frame_interval": 3}, "data.frame_interval=3, .* with 1: set data.frame_interval=1"),
        ({"crop": "random"}, "data.crop=random, .* with center"),
        ({"flip": True}, "no mirrored clips: set data.flip=False"),
        ({"clip_places": 5}, "clip_places=5, .* at 2 places"),
        ({"buckets": (Bucket(),)}, "bucket 16x256x256 is not in the latent store S.* 4x32x32"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_data(recipe, dataclasses.replace(DATA, **change), "S")


@pytest.fixture
def files(tmp_path):
    for name, content in (("a.mp4", b"one"), ("copy.mp4", b"one"), ("b.mp4", b"two")):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(1, 1))
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ["a.mp4", "copy.mp4", "b.mp4", "absent.mp4", "a.mp4", "pipe.mp4"]
    manifest = write_manifest(tmp_path / "m.jsonl", [{"path": name} for name in names])
    return read_manifest(manifest)


def test_files_are_known_by_their_bytes(files):
    keys, failures = file_keys(files, "sha256")
    assert {k: (e.path, e.reason) for k, e in failures.items()} == {
        3: ("absent.mp4", "missing"),
        5: ("pipe.mp4", "not_a_file"),
    }
    assert keys[0].tobytes() == keys[1].tobytes() == keys[4].tobytes() != keys[2].tobytes()
    assert not keys[[3, 5]].any()


def test_files_are_known_by_size_and_time_if_asked(files):
    before, _ = file_keys(files, "size-mtime")
    assert len({key.tobytes() for key in before[:3]}) == 3, "the name counts, too"
    (files.root / "a.mp4").write_bytes(b"uno")
    os.utime(files.root / "a.mp4", ns=(1, 1))
    assert np.array_equal(file_keys(files, "size-mtime")[0], before)
    assert not np.array_equal(file_keys(files, "sha256")[0][0], file_keys(files, "sha256")[0][1])
    os.utime(files.root / "a.mp4", ns=(2, 2))
    changed = (file_keys(files, "size-mtime")[0] != before).any(axis=1)
    assert changed.tolist() == [True, False, False, False, True, False]


def test_processes_can_share_the_looking(files):
    whole, failures = file_keys(files, "sha256")
    parts = [file_keys(files, "sha256", share=share, shares=2) for share in range(2)]
    assert np.array_equal(np.maximum(parts[0][0], parts[1][0]), whole)
    assert (parts[0][1] | parts[1][1]).keys() == failures.keys()
