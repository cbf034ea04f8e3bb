"""torch.compile of each block, as the parallel layer does it: no graph break, the same numbers."""

import pytest
import torch
from reference_models import randomize

from longtake.models import build_model

torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "stdit", "stdit2"])
def test_compiled_block_is_one_graph_with_the_same_numbers(name):
    small = {"depth": 1, "hidden_size": 24, "num_heads": 3, "caption_channels": 10}
    model = randomize(build_model(name, "tiny", **small)).float()
    latents, t_B = torch.randn(2, 4, 2, 4, 4), torch.tensor([3.0, 700.0])
    condition = {
        "prompt_embeds_BLK": torch.randn(2, 5, 10),
        "prompt_mask_BL": torch.arange(5)[None] < torch.tensor([[5], [2]]),
    }
    if model.condition == "label":
        condition = {"labels_B": torch.tensor([1, 2])}
    expected = model(latents, t_B, **condition)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))

    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    out = model(latents, t_B, **condition)
    gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
