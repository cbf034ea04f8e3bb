from dataclasses import replace

import pytest
import torch

from longtake.config import attention_layers, kernels_by_layer, preset, verify_kernels
from longtake.ops import kernels
from longtake.ops.kernels import PLAIN, KernelConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dit", {"full": 4096}),
        ("pixart", {"full": 4096, "text": 120}),
        ("stdit", {"spatial": 256, "temporal": 16, "text": 120}),
        ("stdit2", {"spatial": 256, "temporal": 16, "text": 120}),
        ("latte", {"spatial": 256, "temporal": 16}),
    ],
)
def test_attention_layers_have_the_keys_that_a_token_meets(name, keys):
    config = preset("stdit-xl2-16x256")
    config = replace(config, model=replace(config.model, name=name))
    layers = attention_layers(config, (16, 32, 32))
    assert {layer.name: layer.keys for layer in layers} == keys
    assert kernels_by_layer(config, (16, 32, 32), CPU).keys() == keys.keys() | {"element-wise"}


def test_kernels_by_layer_are_those_of_the_run_not_of_the_process():
    config = preset("stdit-xl2-16x256")
    assert kernels_by_layer(config, (16, 32, 32), CPU)["spatial"] == "sdpa"
    plain = kernels_by_layer(replace(config, kernels=PLAIN), (16, 32, 32), CPU)
    assert set(plain.values()) == {"reference"}


def test_attention_around_a_ring_meets_a_chunk_of_the_keys_at_a_time():
    config = preset("stdit-xl2-16x256")
    parallel = replace(config.parallel, sp=48)
    config = replace(config, model=replace(config.model, name="pixart"), parallel=parallel)
    # 16 heads over as many processes, and three of those in a ring: a third of 4,128 keys.
    full = attention_layers(config, (16, 32, 32))[0]
    assert (full.keys, full.in_parts) == (1376, True)
    assert kernels_by_layer(config, (16, 32, 32), CPU)["full"] == "reference"
    asked = replace(config, kernels=KernelConfig(self_attention="sdpa"))
    with pytest.raises(ValueError, match='by "sdpa" does not tell'):
        kernels_by_layer(asked, (16, 32, 32), CPU)


def test_kernels_that_are_wrong_are_named_and_ruled_out(monkeypatch):
    config = preset("quickstart")
    monkeypatch.setattr(kernels, "_ruled_out", {})
    assert verify_kernels(config, [(4, 4, 4), (1, 4, 4)], CPU) == []

    from longtake.ops import attention

    right = attention.attention_sdpa
    broken = {"sdpa": lambda *inputs: 1.5 * right(*inputs)}
    monkeypatch.setattr(attention, "_BACKENDS", attention._BACKENDS | broken)
    reasons = verify_kernels(config, [(4, 4, 4)], CPU)
    assert any("self_attention by sdpa" in reason for reason in reasons)
    assert kernels_by_layer(config, (4, 4, 4), CPU)["spatial"] == "reference"
