"""A tiny model with what the parallel layer asks for: blocks, odd shapes and a buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.randomness import named_seed


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        # Three rows do not divide over two or four processes.
        self.table = nn.Parameter(torch.empty(3, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        shift, scale, gate = self.table.to(x_BND.dtype).unbind(0)
        x_norm_BND = self.norm(x_BND) * (1 + scale) + shift
        return x_BND + (1 + gate) * self.down(torch.nn.functional.gelu(self.up(x_norm_BND)))


class ToyModel(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, channels)
        self.register_buffer("null_text", torch.empty(5))

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BND = self.embed(x_BNC.to(self.embed.weight.dtype))
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.head(x_BND)


def init_toy(model: nn.Module, write, seed: int = 0) -> None:
    """Every tensor from a generator of its own, as the real models do it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        generator = torch.Generator().manual_seed(named_seed(seed, name))
        write(tensor, torch.randn(tensor.shape, generator=generator) * 0.2)


def toy_batch(step: int, size: int = 8) -> Tensor:
    """The samples of a step, (B, 6, 4): the same for any number of processes."""
    return torch.randn(size, 6, 4, generator=torch.Generator().manual_seed(1000 + step))


def toy_loss(model: nn.Module, x_BNC: Tensor) -> Tensor:
    """Mean over samples of how badly the model doubles its input."""
    return (model(x_BNC).float() - 2 * x_BNC).square().mean()
