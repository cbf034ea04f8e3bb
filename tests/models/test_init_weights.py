import math

import pytest
import torch

from longtake.models import build_model, init_weights
from longtake.randomness import named_seed

torch.set_num_threads(1)

NAMES = ["dit", "pixart", "stdit", "stdit2", "latte"]
SMALL = {"caption_channels": 64, "max_caption_tokens": 20, "num_classes": 50}

ZERO = {
    "dit": ["blocks.1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"],
    "pixart": ["blocks.1.cross_attn.proj.weight"],
    "stdit": ["blocks.1.cross_attn.proj.weight", "blocks.1.attn_temp.proj.weight"],
    "stdit2": ["blocks.1.cross_attn.proj.weight", "blocks.1.attn_temp.proj.weight"],
    "latte": ["blocks.1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"],
}


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_branches_and_biases_start_at_zero(name):
    state = build_model(name, "tiny", **SMALL).state_dict()
    biases = [key for key in state if key.endswith(".bias")]
    for key in [*ZERO[name], *biases, "final_layer.linear.weight"]:
        assert (state[key] == 0).all(), key
    zeros = [k for k in state if (state[k] == 0).all() and not k.endswith(".bias")]
    assert len(zeros) < 2 * 4 + 3, f"more zeros than the originals have: {zeros}"


def test_spread_of_each_kind_of_weight_is_the_originals():
    state = build_model("stdit2", "tiny", **SMALL).state_dict()
    state |= {f"label.{k}": v for k, v in build_model("dit", "tiny", **SMALL).state_dict().items()}
    spreads = {
        "blocks.0.attn.qkv.weight": math.sqrt(2 / (128 + 384)),  # Xavier
        "blocks.0.mlp.fc1.weight": math.sqrt(2 / (128 + 512)),
        "x_embedder.proj.weight": math.sqrt(2 / (128 + 16)),
        "t_embedder.mlp.0.weight": 0.02,
        "t_block.1.weight": 0.02,
        "t_block_temp.1.weight": 0.02,
        "y_embedder.y_proj.fc1.weight": 0.02,
        "label.y_embedder.embedding_table.weight": 0.02,
        "blocks.0.scale_shift_table": 128**-0.5,
        "blocks.0.scale_shift_table_temporal": 128**-0.5,
        "final_layer.scale_shift_table": 128**-0.5,
        "y_embedder.y_embedding": 64**-0.5,
    }
    for key, spread in spreads.items():
        assert state[key].std().item() == pytest.approx(spread, rel=0.15), key
    assert (state["blocks.0.attn_temp.q_norm.weight"] == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_predicts_zero(name):
    model = build_model(name, "tiny", **SMALL)
    condition = {"prompt_embeds_BLK": torch.randn(1, 3, 64)}
    if model.condition == "label":
        condition = {"labels_B": torch.tensor([1])}
    assert (model(torch.randn(1, 4, 2, 4, 4), torch.tensor([3.0]), **condition) == 0).all()


def test_values_depend_on_seed_and_name_only():
    model = build_model("stdit", "tiny", **SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    init_weights(model, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    init_weights(model, seed=1)
    assert not torch.equal(model.state_dict()["t_block.1.weight"], before["t_block.1.weight"])
    # A deeper model has the same first blocks: nothing depends on what was drawn before.
    deeper = build_model("stdit", "tiny", depth=6, **SMALL).state_dict()
    assert all(torch.equal(deeper[k], v) for k, v in before.items())


def test_writer_gets_full_tensors_from_the_name_seeded_generator():
    with torch.device("meta"):
        model = build_model("pixart", "tiny", **SMALL)
    written = {}
    init_weights(model, seed=7, write=lambda target, full: written.update({id(target): full}))
    targets = model.state_dict(keep_vars=True)
    assert all(written[id(t)].shape == t.shape for t in targets.values())
    generator = torch.Generator().manual_seed(named_seed(7, "t_block.1.weight"))
    expected = torch.empty(6 * 128, 128).normal_(std=0.02, generator=generator)
    assert torch.equal(written[id(targets["t_block.1.weight"])], expected)
