"""Models on the fused kernels against the same models in plain torch: what is trained is the same
function, in every branch at once."""

import pytest
import torch
from reference_models import randomize
from torch import Tensor, nn

from longtake.models import build_model
from longtake.ops.kernels import PLAIN, KernelConfig, kernels_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = KernelConfig(
    elementwise="triton",
    self_attention="triton",
    temporal_attention="triton",
    cross_attention="triton",
)


def _model_and_inputs(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    small = {"depth": 1, "hidden_size": 32, "num_heads": 2, "caption_channels": 10}
    model = randomize(build_model(name, "tiny", **small)).float().to(DEVICE)
    latents, t_B = torch.randn(2, 4, 2, 4, 6), torch.tensor([3.0, 700.0])
    if model.condition == "label":
        condition = {"labels_B": torch.tensor([1, 2])}
    else:
        mask = torch.arange(5)[None] < torch.tensor([[5], [0]])  # an empty caption, too
        condition = {"prompt_embeds_BLK": torch.randn(2, 5, 10), "prompt_mask_BL": mask}
    condition = {key: value.to(DEVICE) for key, value in condition.items()}
    return model, (latents.to(DEVICE), t_B.to(DEVICE)), condition


def _run(model: nn.Module, inputs: tuple[Tensor, Tensor], condition: dict[str, Tensor]):
    out = model(*inputs, **condition)
    names = [name for name, _ in model.named_parameters()]
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum(), list(model.parameters()))
    return out.detach(), dict(zip(names, gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "stdit", "stdit2"])
def test_fused_model_is_the_plain_model(name: str):
    model, inputs, condition = _model_and_inputs(name)
    with kernels_as(PLAIN):
        expected, expected_gradients = _run(model, inputs, condition)
    with kernels_as(FUSED):
        out, gradients = _run(model, inputs, condition)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for key, gradient in gradients.items():
        scale = expected_gradients[key].abs().max().clamp(min=1e-3)
        assert (gradient - expected_gradients[key]).abs().max() <= 2e-5 * scale, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stdit2"])
def test_fused_block_compiles_whole(name: str):
    model, inputs, condition = _model_and_inputs(name)
    with kernels_as(FUSED):
        expected, expected_gradients = _run(model, inputs, condition)
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        out, gradients = _run(model, inputs, condition)
    torch.testing.assert_close(out, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-5, msg=key)
