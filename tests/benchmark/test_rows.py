from collections import Counter
from dataclasses import replace

import pytest
import torch

from longtake.benchmark.inputs import latent_shape
from longtake.benchmark.rows import TABLES, Policy, rows, tiny
from longtake.config import preset, work_of_latents
from longtake.models import build_model_from_config
from tests.benchmark.conftest import row

ALL = rows("all")


def test_tables_are_parts_of_all():
    assert Counter(row.table for row in ALL) == {name: len(rows(name)) for name in TABLES}
    assert len({row.key for row in ALL}) == len(ALL)
    with pytest.raises(ValueError, match="table=pictures does not exist: use images"):
        rows("pictures")


def _tokens(row):
    latents = latent_shape(row.config, row.config.data.buckets[0])
    return work_of_latents(row.config, latents[1:], samples=1)["tokens"]


def test_cheap_rows_come_first():
    # By the tokens of a sample, which is what a cut-short run should lose the largest of.
    without_encoders = [row for row in ALL if row.encoders == "absent"]
    tokens = [min(_tokens(row), 65_536) for row in without_encoders]
    assert tokens == sorted(tokens)


# The printed tokens/s, and the tokens a sample that they rest on.
@pytest.mark.parametrize(
    ("key", "what", "printed_tokens", "factor"),
    [
        ("dit-256-batch128", "DiT", 26e3, 1),
        ("dit-256-batch128", "OpenSora", 45e3, 1),
        ("full-16x256", "DiT 16x256", 29e3, 1),
        ("stdit-16x256", "STDiT 16x256", 28e3, 1),
        ("full-16x512", "DiT 16x512", 14e3, 1),
        ("stdit-16x512", "STDiT 16x512", 23e3, 1),
        ("full-64x512", "DiT (GC) 64x512", 5e3, 1),
        ("stdit-64x512", "STDiT (GC) 64x512", 25e3, 1),
        ("stdit-360x512", "STDiT (GC, sp=2) 360x512", 18e3, 0.5),  # printed per pair
        ("stdit-16x256-on-line-baseline", "Baseline, 16x256", 25e3, 1),
        ("stdit-16x512-on-line-baseline", "Baseline, 64x512", 15e3, 1),  # mislabelled
        ("stdit-16x512-on-line", "w. both, 64x512", 23e3, 1),  # mislabelled
    ],
)
def test_printed_samples_times_tokens_are_the_printed_tokens(key, what, printed_tokens, factor):
    found = row(key)
    figure = next(figure for figure in found.printed if figure.what.startswith(what))
    product = figure.samples_per_second * _tokens(found) * factor
    assert product == pytest.approx(printed_tokens, rel=0.06)


def test_mislabelled_rows_say_so():
    notes = {figure.what: figure.note for row in ALL for figure in row.printed}
    assert "16,384 tokens of 16x512" in notes["Baseline, 64x512"]
    assert "16,384 tokens of 16x512" in notes["w. both, 64x512"]
    assert "0.05 a GPU" in notes["STDiT (GC, sp=2) 360x512"]


@pytest.mark.parametrize("made", [False, True], ids=["full", "tiny"])
@pytest.mark.parametrize("one", ALL, ids=lambda row: row.key)
def test_row_is_a_model_that_can_be_built(one, made):
    config = (tiny(one) if made else one).config
    with torch.device("meta"):
        model = build_model_from_config(config.model)
    parameters = sum(param.numel() for param in model.parameters())
    assert parameters < 1e6 if made else parameters > 600e6
    assert (model.condition == "label") == (config.text_encoder.kind == "none")
    assert made or config.uses_random_encoders


def test_the_minute_keeps_what_an_h200_holds_and_else_what_its_preset_says():
    minute = row("stdit-1min-1080p-sp2")
    most, least = (policy.on(minute.config).parallel for policy in minute.policies)
    own = preset("stdit-xl2-1min-1080p").parallel
    assert (own.checkpointing, own.offload, own.kept_inputs) == ("nested", True, 0)
    assert least == replace(own, sp=2, zero=2)
    assert most == replace(least, pieces="pointwise", kept_inputs=20)
    assert Policy.of(minute.config) == minute.policies[1]


def test_the_minute_on_one_gpu_leaves_its_host_what_128_gib_hold():
    one = row("stdit-1min-1080p")
    (policy,) = one.policies
    depth, hidden_size, _ = one.config.model.dimensions
    input_gib = 2_937_600 * hidden_size * 2 / 2**30
    assert (policy.checkpointing, policy.offload, policy.pieces) == ("nested", True, "all")
    assert 100 < (depth - policy.kept_inputs) * input_gib < 110
    assert row("stdit-1min-1080p-sp2").baseline == one.key


@pytest.mark.parametrize("size", ["16x256", "16x512", "64x512"])
def test_encoders_rows_change_one_thing_at_a_time(size):
    key = f"stdit-{size}-on-line"
    names = {"baseline": "-baseline", "t5": "-fast-t5", "vae": "-fast-vae", "serial": "-serial"}
    found = {name: row(key + suffix) for name, suffix in names.items()}
    ahead, cached = row(key), row(f"stdit-{size}-cached")
    assert {one.micro_batch for one in (*found.values(), ahead, cached)} == {ahead.micro_batch}
    assert ahead.micro_batch * _tokens(ahead) == 65_536
    assert {one.baseline for one in (*found.values(), ahead, cached)} == {f"{key}-baseline"}
    configs = {name: one.config for name, one in found.items()}
    text = {name: config.text_encoder for name, config in configs.items()}
    video = {name: config.video_encoder for name, config in configs.items()}
    assert (text["baseline"].dtype, text["baseline"].compile) == ("fp32", False)
    assert text["baseline"] == text["vae"] != text["t5"] == text["serial"]
    assert video["baseline"] == video["t5"] != video["vae"] == video["serial"]
    # The widest activations of a call, 128 channels, stay below 2**31 values.
    frames, pixels = video["baseline"].frames_per_call, ahead.config.data.buckets[0].height ** 2
    assert video["baseline"].compile is False
    assert 2**30 <= frames * pixels * 128 < 2**31
    assert not any(config.train.encode_ahead for config in configs.values())
    assert replace(ahead.config, train=configs["serial"].train) == configs["serial"]
    assert ahead.config.train.encode_ahead
    assert (cached.encoders, cached.config) == ("cached", configs["serial"])
    keys = [one.key for one in rows("encoders")]
    assert keys.index(f"{key}-baseline") < min(keys.index(k) for k in (key, f"{key}-fast-t5"))
