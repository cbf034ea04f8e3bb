"""Names, shapes and totals of the public checkpoints, generated from their descriptions."""

import pytest
import torch

from longtake.models import build_model

D = 1152


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def embed_scalar(name, width):
    return linear(f"{name}.mlp.0", width, 256) | linear(f"{name}.mlp.2", width, width)


def attention(name):
    return linear(f"{name}.qkv", 3 * D, D) | linear(f"{name}.proj", D, D)


def mlp(name, inner=4 * D):
    return linear(f"{name}.fc1", inner, D) | linear(f"{name}.fc2", D, inner)


def patch(*kernel):
    return {"x_embedder.proj.weight": (D, 4, *kernel), "x_embedder.proj.bias": (D,)}


def dit():
    layout = patch(2, 2) | embed_scalar("t_embedder", D)
    layout |= {"y_embedder.embedding_table.weight": (1001, D)}
    for i in range(28):
        layout |= attention(f"blocks.{i}.attn") | mlp(f"blocks.{i}.mlp")
        layout |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    layout |= linear("final_layer.linear", 32, D)
    return layout | linear("final_layer.adaLN_modulation.1", 2 * D, D)


def pixart():
    layout = patch(2, 2) | embed_scalar("t_embedder", D) | linear("t_block.1", 6 * D, D)
    layout |= linear("y_embedder.y_proj.fc1", D, 4096) | linear("y_embedder.y_proj.fc2", D, D)
    for i in range(28):
        layout |= {f"blocks.{i}.scale_shift_table": (6, D)}
        layout |= attention(f"blocks.{i}.attn") | mlp(f"blocks.{i}.mlp")
        layout |= linear(f"blocks.{i}.cross_attn.q_linear", D, D)
        layout |= linear(f"blocks.{i}.cross_attn.kv_linear", 2 * D, D)
        layout |= linear(f"blocks.{i}.cross_attn.proj", D, D)
    layout |= {"final_layer.scale_shift_table": (2, D)}
    return layout | linear("final_layer.linear", 32, D)


def pixart_ms():
    return pixart() | embed_scalar("csize_embedder", D // 3) | embed_scalar("ar_embedder", D // 3)


def stdit():
    layout = pixart() | patch(1, 2, 2)
    for i in range(28):
        layout |= attention(f"blocks.{i}.attn_temp")
    return layout


def stdit2():
    layout = stdit() | linear("t_block_temp.1", 3 * D, D)
    for i in range(28):
        layout |= {f"blocks.{i}.scale_shift_table_temporal": (3, D)}
        for branch in ("attn", "attn_temp"):
            for norm in ("q_norm", "k_norm"):
                layout |= {f"blocks.{i}.{branch}.{norm}.weight": (72,)}
    return layout


NULL_CAPTION = {"y_embedder.y_embedding": (120, 4096)}
CASES = {
    # Meta's total counts the position table, 256 x 1152, which is computed here.
    "dit": ("dit", {}, dit(), {}, 675_129_632 - 256 * D, 291),
    "latte": ("latte", {}, dit(), {}, 675_129_632 - 256 * D, 291),
    "pixart": ("pixart", {}, pixart(), NULL_CAPTION, 610_856_096, 435),
    "pixart_ms": (
        "pixart",
        {"micro_conditioning": True},
        pixart_ms(),
        NULL_CAPTION,
        611_349_152,
        443,
    ),
    "stdit": ("stdit", {}, stdit(), NULL_CAPTION, 759_620_768, 547),
    "stdit2": ("stdit2", {}, stdit2(), NULL_CAPTION, 763_710_368, 689),
}


@pytest.mark.parametrize(
    ("name", "overrides", "parameters", "buffers", "total", "count"), CASES.values(), ids=CASES
)
def test_names_and_shapes_are_the_public_ones(name, overrides, parameters, buffers, total, count):
    with torch.device("meta"):
        model = build_model(name, "XL", **overrides)
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert {k: tuple(p.shape) for k, p in model.named_parameters()} == parameters
    assert {k: tuple(b.shape) for k, b in model.named_buffers()} == buffers
    assert set(model.state_dict()) == set(parameters) | set(buffers)
    assert sum(p.numel() for p in model.parameters()) == total
    assert len(list(model.parameters())) == count


@pytest.mark.parametrize(
    ("name", "tensors", "values"), [("dit", 10, 23_905_152), ("stdit", 19, 26_568_576)]
)
def test_block_size_is_the_public_one(name, tensors, values):
    with torch.device("meta"):
        block = build_model(name).blocks[0]
    assert len(list(block.parameters())) == tensors
    assert sum(p.numel() for p in block.parameters()) == values


@pytest.mark.parametrize(
    ("size", "depth", "hidden_size", "num_heads"),
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)],
)
@pytest.mark.parametrize("name", ["dit", "pixart", "stdit", "stdit2", "latte"])
def test_sizes_are_those_of_the_dit_paper(name, size, depth, hidden_size, num_heads):
    with torch.device("meta"):
        model = build_model(name, size)
    assert len(model.blocks) == depth
    assert model.blocks[0].attn.num_heads == num_heads
    assert model.blocks[0].attn.proj.weight.shape == (hidden_size, hidden_size)
