import pytest
import torch

from longtake.models import ModelConfig
from longtake.weights import LAYOUTS, WeightsError, infer_config
from longtake.weights.infer import grid_of, scale_of


def infer(state, layout, **options):
    return infer_config(state, LAYOUTS[layout], **options)


@pytest.mark.parametrize(
    ("layout", "size", "depth", "hidden", "heads"),
    [("dit", "S", 12, 384, 6), ("dit", "L", 24, 1024, 16), ("pixart", "XL", 28, 1152, 16)],
    ids=["S", "L", "XL"],
)
def test_named_sizes_are_recognized(public_shapes, layout, size, depth, hidden, heads):
    shapes = public_shapes(layout, hidden, depth)
    with torch.device("meta"):
        state = {k: torch.empty(v) for k, v in shapes.items() if k not in LAYOUTS[layout].positions}
    config = infer(state, layout).config
    assert (config.size, config.depth, config.hidden_size, config.num_heads) == (size, *[None] * 3)
    assert config.dimensions == (depth, hidden, heads)


def test_everything_is_read_from_a_pixart_file(public_state):
    inferred = infer(public_state("pixart", space_scale=2.0, micro=True, tokens=7), "pixart")
    assert inferred.config == ModelConfig(
        name="pixart",
        depth=2,
        hidden_size=144,
        num_heads=2,
        caption_channels=24,
        max_caption_tokens=7,
        space_scale=2.0,
        base_size=4,
        micro_conditioning=True,
    )
    assert inferred.grid_THW == (None, 4, 4)
    assert inferred.notes == ("num_heads=2 is assumed, 72 wide each",)


def test_everything_is_read_from_an_stdit_file(public_state):
    state = public_state("stdit", space_scale=0.5, time_scale=2 / 3, frames=5)
    inferred = infer(state, "stdit", num_heads=4)
    config = inferred.config
    assert (config.name, config.num_heads, config.patch_size) == ("stdit", 4, (1, 2, 2))
    assert (config.space_scale, config.time_scale, config.base_size) == (0.5, 2 / 3, None)
    assert (inferred.grid_THW, inferred.notes) == ((5, 4, 4), ())


def test_classes_channels_and_sigma_are_read(public_state):
    state = public_state("latte", classes=5)
    state["x_embedder.proj.weight"] = torch.zeros(144, 16, 2, 2)
    state["final_layer.linear.weight"] = torch.zeros(64, 144)
    config = infer(state, "latte").config
    assert (config.num_classes, config.in_channels, config.learn_sigma) == (5, 16, False)


def test_a_file_without_positions_says_what_is_assumed(public_state):
    state = public_state("pixart")
    del state["pos_embed"]
    inferred = infer(state, "pixart")
    assert (inferred.config.space_scale, inferred.config.base_size) == (1.0, None)
    assert "no spatial position buffer" in inferred.notes[-1]


@pytest.mark.parametrize("scale", [0.25, 0.5, 2 / 3, 1.0, 1.5, 2.0, 4.0, 1.2345])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grid_and_scale_of_a_table_are_found(position_table, scale, dtype):
    table_SD = position_table(3, 5, 32, scale)[0].to(dtype)
    assert grid_of(table_SD) == (3, 5)
    assert scale_of(table_SD[:5, :16]) == pytest.approx(
        scale, rel=2e-3 if scale == 1.2345 else 1e-9
    )


def test_a_table_that_is_none_gives_no_scale():
    assert grid_of(torch.randn(12, 8)) == (1, 12)
    assert scale_of(torch.zeros(1, 8)) is None


def test_senseless_shapes_are_named(public_state):
    state = public_state("dit")
    state["final_layer.linear.weight"] = torch.zeros(20, 144)
    with pytest.raises(WeightsError, match="gives 5 channels per value, expected 4 or 8"):
        infer(state, "dit")
    del state["x_embedder.proj.weight"]
    with pytest.raises(WeightsError, match=r"x_embedder\.proj\.weight is missing"):
        infer(state, "dit")
