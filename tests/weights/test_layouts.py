import math

import pytest
import torch

from longtake.models import build_model
from longtake.weights import LAYOUTS, WeightsError, detect_layout


@pytest.mark.parametrize(
    ("layout", "options", "sizes", "num_tensors", "num_values"),
    [
        ("dit", {}, {"classes": 1000, "side": 16}, 292, 675_129_632),
        ("latte", {"num_classes": 101}, {"classes": 101, "side": 16, "frames": 16}, 293, None),
        ("pixart", {}, {"side": 32}, 435, 610_856_096),
        ("pixart", {"micro_conditioning": True}, {"side": 64, "micro": True}, 443, 611_349_152),
        ("stdit", {}, {"side": 16, "frames": 16}, 547, 759_620_768),
    ],
    ids=["dit", "latte", "pixart", "pixart-ms", "stdit"],
)
def test_xl_models_have_the_public_keys_and_shapes(
    public_shapes, layout, options, sizes, num_tensors, num_values
):
    shapes = public_shapes(layout, 1152, 28, **sizes)
    # The published counts include DiT's position table, which is a parameter there, and no buffers.
    buffers = {
        "y_embedder.y_embedding",
        *(() if layout in ("dit", "latte") else LAYOUTS[layout].positions),
    }
    counted = [shape for key, shape in shapes.items() if key not in buffers]
    if num_values is not None:
        assert (len(counted), sum(map(math.prod, counted))) == (num_tensors, num_values)

    with torch.device("meta"):
        model = build_model(layout, "XL", **options)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == {k: v for k, v in shapes.items() if k not in LAYOUTS[layout].positions}


@pytest.mark.parametrize(
    "layout", ["dit", "latte", "pixart", "stdit", "opensora-dit", "opensora-pixart"]
)
def test_layout_is_detected_from_keys(public_state, layout):
    assert detect_layout(public_state(layout)) == layout


def test_files_without_position_buffers_are_detected(public_state):
    for layout, expected in [("pixart", "pixart"), ("stdit", "stdit"), ("latte", "dit")]:
        state = {
            k: v for k, v in public_state(layout).items() if k not in LAYOUTS[layout].positions
        }
        assert detect_layout(state) == expected


def test_stdit2_is_told_from_stdit():
    with torch.device("meta"):
        assert detect_layout(build_model("stdit2", "tiny").state_dict()) == "stdit2"
        assert detect_layout(build_model("stdit", "tiny").state_dict()) == "stdit"


def test_what_no_model_can_hold_is_refused_with_the_reason(public_state):
    with pytest.raises(WeightsError, match=r"unknown layout: keys such as a\.b; known are DiT"):
        detect_layout({"a.b": torch.zeros(1)})
    unconditional = public_state("latte")
    del unconditional["y_embedder.embedding_table.weight"]
    with pytest.raises(WeightsError, match="class-conditional"):
        detect_layout(unconditional)
    latte_t2v = {
        "transformer_blocks.0.attn1.to_q.weight": torch.zeros(1),
        "temporal_transformer_blocks.0.attn1.to_q.weight": torch.zeros(1),
    }
    with pytest.raises(WeightsError, match="text-to-video Latte"):
        detect_layout(latte_t2v)
    with pytest.raises(WeightsError, match="unknown diffusers transformer"):
        detect_layout({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)})
