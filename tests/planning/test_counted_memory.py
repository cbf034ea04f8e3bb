"""The predicted peak beside a count of all tensors, at the sizes of long videos."""

from dataclasses import replace

import pytest

from longtake.config import preset
from longtake.diffusion import DiffusionConfig
from longtake.planning import TokenGrid, peak_memory
from tests.planning.counted_memory import count_and_predict, count_loss


@pytest.mark.parametrize(
    ("name", "model", "sp", "fields"),
    [
        ("stdit-xl2-360x512", "stdit", 1, {"checkpointing": "none"}),
        ("stdit-xl2-360x512", "stdit", 2, {"checkpointing": "full"}),
        ("stdit-xl2-360x512", "stdit", 1, {"checkpointing": "nested"}),
        ("stdit-xl2-360x512", "stdit", 2, {"checkpointing": "nested", "pieces": "pointwise"}),
        ("stdit-xl2-360x512", "pixart", 1, {"checkpointing": "nested"}),
        # With pieces this small the fullest moment is another: tokens between processes.
        ("stdit-xl2-1min-1080p", "stdit", 2, {"checkpointing": "nested", "pieces": "pointwise"}),
        ("stdit-xl2-1min-1080p", "stdit", 2, {"checkpointing": "nested"}),
    ],
)
def test_what_is_predicted_is_what_tensors_take(name, model, sp, fields):
    config = preset(name)
    config = replace(
        config,
        model=replace(config.model, name=model, depth=2),
        parallel=replace(config.parallel, sp=sp, **fields),
    )
    counted, predicted = count_and_predict(config)
    # One tensor of tokens is 4 % or more of what a nested run of two blocks holds.
    assert predicted.total - predicted.states == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("zero", "blocks_per_unit"), [(0, None), (0, 8), (2, 1), (2, None), (2, 8), (3, 1), (3, 4)]
)
def test_weights_and_gradients_on_their_way_are_counted(checkpointing, zero, blocks_per_unit):
    config = preset("stdit-xl2-16x256")  # one clip of it, so that weights are most of what is held
    how = {"sp": 2, "checkpointing": checkpointing, "zero": zero}
    config = replace(
        config,
        model=replace(config.model, depth=8),
        parallel=replace(config.parallel, blocks_per_unit=blocks_per_unit, **how),
    )
    counted, predicted = count_and_predict(config)
    assert predicted.total == pytest.approx(counted + predicted.states, rel=0.05)


def test_inputs_that_stay_are_counted():
    config = preset("stdit-xl2-360x512")
    fields = {"sp": 2, "checkpointing": "nested", "offload": True, "kept_inputs": 4}
    config = replace(
        config,
        model=replace(config.model, depth=6),
        parallel=replace(config.parallel, **fields),
    )
    counted, predicted = count_and_predict(config)
    assert predicted.total - predicted.states == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("objective", ["iddpm", "flow"])
def test_latents_that_a_loss_holds(objective):
    predicted = peak_memory(
        "dit",
        TokenGrid(1, 1),
        hidden_size=0,
        num_heads=0,
        depth=1,
        parameters=0,
        block_parameters=0,
        micro_batch=1,
        latent_values=1,
        checkpointing="none",
        objective=objective,
    )
    # Half of one is in bf16 and the embedding's.
    assert predicted.working / 4 == pytest.approx(
        count_loss(DiffusionConfig(objective=objective)) + 0.5, abs=1
    )
