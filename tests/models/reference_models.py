"""The five models once more, as plain functions of a public state dict: slow, and written from the
papers' formulas and the public layouts, not from the code under test.

One sample at a time, explicit softmax, text packed to its valid tokens, positions in loops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centered = x - x.mean(dim=-1, keepdim=True)
    normalized = centered / torch.sqrt((centered**2).mean(dim=-1, keepdim=True) + 1e-6)
    return normalized * (1 + scale) + shift


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", gelu(linear(w, f"{name}.fc1", x)))


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(N, D) queries over (L, D) keys; head i owns columns i E .. (i + 1) E."""
    heads = []
    for q_h, k_h, v_h in zip(*(x.chunk(num_heads, dim=1) for x in (q, k, v)), strict=True):
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[1])
        heads.append(torch.softmax(scores, dim=1) @ v_h)
    return torch.cat(heads, dim=1)


def self_attention(w: Weights, name: str, x: Tensor, num_heads: int) -> Tensor:
    q, k, v = linear(w, f"{name}.qkv", x).chunk(3, dim=1)
    return linear(w, f"{name}.proj", attend(q, k, v, num_heads))


def rotate(x: Tensor, time_scale: float) -> Tensor:
    """Rows of one head (T, E): pair i of frame t is turned by t / time_scale * 10000^(-2i / E)."""
    frames, head_size = x.shape
    rows = []
    for t in range(frames):
        row = []
        for i in range(head_size // 2):
            angle = t / time_scale * 10000 ** (-2 * i / head_size)
            a, b = x[t, 2 * i], x[t, 2 * i + 1]
            row += [
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def normed_attention(
    w: Weights, name: str, x: Tensor, num_heads: int, time_scale: float | None
) -> Tensor:
    """Self-attention with q/k norm per head, and rotary positions if there is a time scale."""
    q, k, v = linear(w, f"{name}.qkv", x).chunk(3, dim=1)
    normed = []
    for part, norm in ((q, "q_norm"), (k, "k_norm")):
        heads = [rms(head, w[f"{name}.{norm}.weight"]) for head in part.chunk(num_heads, dim=1)]
        if time_scale is not None:
            heads = [rotate(head, time_scale) for head in heads]
        normed.append(torch.cat(heads, dim=1))
    return linear(w, f"{name}.proj", attend(*normed, v, num_heads))


def cross_attention(w: Weights, name: str, x: Tensor, text: Tensor, num_heads: int) -> Tensor:
    """(N, D) tokens over the (L, D) valid text tokens of their sample."""
    q = linear(w, f"{name}.q_linear", x)
    k, v = linear(w, f"{name}.kv_linear", text).chunk(2, dim=1)
    attended = attend(q, k, v, num_heads) if len(text) else torch.zeros_like(q)
    return linear(w, f"{name}.proj", attended)


def waves(position: float, frequencies: int) -> np.ndarray:
    angles = [float(position) * 10000.0 ** (-i / frequencies) for i in range(frequencies)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def space_table(
    height: int, width: int, hidden_size: int, space_scale: float, base_size: int | None
) -> Tensor:
    """(S, D): for each patch, row by row, its column and then its row."""
    rows = []
    for r in range(height):
        for c in range(width):
            place = []
            for index, count in ((c, width), (r, height)):
                stretch = 1.0 if base_size is None else count / base_size
                place.append(np.float32(index / stretch / space_scale))
            rows.append(np.concatenate([waves(p, hidden_size // 4) for p in place]))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def time_table(frames: int, hidden_size: int, time_scale: float) -> Tensor:
    table = np.stack([waves(t / time_scale, hidden_size // 2) for t in range(frames)])
    return torch.from_numpy(table.astype(np.float32))


def embed_scalar(w: Weights, name: str, value: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = value.float() * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)]).to(w[f"{name}.mlp.0.weight"].dtype)
    return linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", features)))


def patches(w: Weights, latents_CTHW: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Tokens (T, S, D) by convolution, and the grid."""
    for dim in (1, 2, 3):
        missing = -latents_CTHW.shape[dim] % patch[dim - 1]
        shape = list(latents_CTHW.shape)
        shape[dim] = missing
        latents_CTHW = torch.cat([latents_CTHW, latents_CTHW.new_zeros(shape)], dim=dim)
    weight, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    if weight.dim() == 4:
        x_TDHW = F.conv2d(latents_CTHW.transpose(0, 1), weight, bias, stride=patch[1:])
    else:
        x_TDHW = F.conv3d(latents_CTHW[None], weight, bias, stride=patch)[0].transpose(0, 1)
    grid = (x_TDHW.shape[0], x_TDHW.shape[2], x_TDHW.shape[3])
    return x_TDHW.flatten(2).transpose(1, 2), grid


def assemble(values_TSP: Tensor, grid: tuple, patch: tuple, like_CTHW: Tensor) -> Tensor:
    """Latents (C_out, T, H, W) from patch values, pixel by pixel."""
    T, H, W = grid
    pt, ph, pw = patch
    channels = values_TSP.shape[-1] // (pt * ph * pw)
    out = values_TSP.new_zeros(channels, T * pt, H * ph, W * pw)
    values = values_TSP.view(T, H, W, pt, ph, pw, channels)
    for p in range(pt):
        for q in range(ph):
            for r in range(pw):
                out[:, p::pt, q::ph, r::pw] = values[:, :, :, p, q, r].permute(3, 0, 1, 2)
    return out[:, : like_CTHW.shape[1], : like_CTHW.shape[2], : like_CTHW.shape[3]]


def adaptive_block(w: Weights, name: str, x: Tensor, condition: Tensor, num_heads: int) -> Tensor:
    """DiT's block on one sequence (N, D)."""
    rows = linear(w, f"{name}.adaLN_modulation.1", silu(condition)).chunk(6)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows
    h = self_attention(w, f"{name}.attn", modulated_norm(x, shift_msa, scale_msa), num_heads)
    x = x + gate_msa * h
    return x + gate_mlp * mlp(w, f"{name}.mlp", modulated_norm(x, shift_mlp, scale_mlp))


def label_model(
    w: Weights, config, latents_BCTHW: Tensor, t_B: Tensor, labels: list[int]
) -> Tensor:
    """DiT, or Latte if the config says so."""
    depth, hidden_size, num_heads = config.dimensions
    outputs = []
    for latents, t, label in zip(latents_BCTHW, t_B, labels, strict=True):
        x_TSD, grid = patches(w, latents, config.patch_size)
        T, H, W = grid
        x_TSD = x_TSD + space_table(H, W, hidden_size, config.space_scale, config.base_size)
        time_TD = time_table(T, hidden_size, config.time_scale)
        condition = embed_scalar(w, "t_embedder", t) + w["y_embedder.embedding_table.weight"][label]
        if config.name == "dit" and T > 1:
            x_TSD = x_TSD + time_TD[:, None]
        for i in range(depth):
            name = f"blocks.{i}"
            if config.name == "dit":
                x = adaptive_block(w, name, x_TSD.flatten(0, 1), condition, num_heads)
                x_TSD = x.view_as(x_TSD)
            elif i % 2 == 0:
                frames = [adaptive_block(w, name, x, condition, num_heads) for x in x_TSD]
                x_TSD = torch.stack(frames)
            else:
                if i == 1:
                    x_TSD = x_TSD + time_TD[:, None]
                places = [adaptive_block(w, name, x, condition, num_heads) for x in x_TSD.unbind(1)]
                x_TSD = torch.stack(places, dim=1)
        shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(condition)).chunk(2)
        values = linear(w, "final_layer.linear", modulated_norm(x_TSD, shift, scale))
        outputs.append(assemble(values, grid, config.patch_size, latents))
    return torch.stack(outputs)


def table_block(
    w: Weights, config, i: int, x_TSD: Tensor, rows: Tensor, rows_temporal, text
) -> Tensor:
    """The block of PixArt, STDiT or STDiT2 on one sample."""
    num_heads = config.dimensions.num_heads
    name = f"blocks.{i}"
    table = w[f"{name}.scale_shift_table"] + rows
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table
    h_TSD = modulated_norm(x_TSD, shift_msa, scale_msa)
    if config.name == "pixart":
        h = self_attention(w, f"{name}.attn", h_TSD.flatten(0, 1), num_heads)
        x_TSD = x_TSD + gate_msa * h.view_as(x_TSD)
    if config.name == "stdit":
        frames = [self_attention(w, f"{name}.attn", h, num_heads) for h in h_TSD]
        x_TSD = x_TSD + gate_msa * torch.stack(frames)
        h_TSD = x_TSD
        if i == 0:
            T, _, hidden_size = x_TSD.shape
            h_TSD = h_TSD + time_table(T, hidden_size, config.time_scale)[:, None]
        places = [self_attention(w, f"{name}.attn_temp", h, num_heads) for h in h_TSD.unbind(1)]
        x_TSD = x_TSD + gate_msa * torch.stack(places, dim=1)
    if config.name == "stdit2":
        frames = [normed_attention(w, f"{name}.attn", h, num_heads, None) for h in h_TSD]
        x_TSD = x_TSD + gate_msa * torch.stack(frames)
        shift, scale, gate = w[f"{name}.scale_shift_table_temporal"] + rows_temporal
        places = [
            normed_attention(w, f"{name}.attn_temp", h, num_heads, config.time_scale)
            for h in modulated_norm(x_TSD, shift, scale).unbind(1)
        ]
        x_TSD = x_TSD + gate * torch.stack(places, dim=1)
    h = cross_attention(w, f"{name}.cross_attn", x_TSD.flatten(0, 1), text, num_heads)
    x_TSD = x_TSD + h.view_as(x_TSD)
    return x_TSD + gate_mlp * mlp(w, f"{name}.mlp", modulated_norm(x_TSD, shift_mlp, scale_mlp))


def text_model(
    w: Weights,
    config,
    latents_BCTHW: Tensor,
    t_B: Tensor,
    captions: list[Tensor],
    sizes: list[tuple[float, float, float]] | None = None,
) -> Tensor:
    """PixArt, STDiT or STDiT2; captions are (valid tokens, K), sizes (height, width, ratio)."""
    depth, hidden_size, _ = config.dimensions
    outputs = []
    for b, (latents, t, caption) in enumerate(zip(latents_BCTHW, t_B, captions, strict=True)):
        x_TSD, grid = patches(w, latents, config.patch_size)
        T, H, W = grid
        x_TSD = x_TSD + space_table(H, W, hidden_size, config.space_scale, config.base_size)
        if config.name == "pixart" and T > 1:
            x_TSD = x_TSD + time_table(T, hidden_size, config.time_scale)[:, None]
        t_D = embed_scalar(w, "t_embedder", t)
        if sizes is not None:
            names = ("csize_embedder", "csize_embedder", "ar_embedder")
            parts = zip(names, sizes[b], strict=True)
            t_D = t_D + torch.cat([embed_scalar(w, name, torch.tensor(v)) for name, v in parts])
        rows = linear(w, "t_block.1", silu(t_D)).view(6, hidden_size)
        rows_temporal = None
        if config.name == "stdit2":
            rows_temporal = linear(w, "t_block_temp.1", silu(t_D)).view(3, hidden_size)
        text = mlp(w, "y_embedder.y_proj", caption)
        for i in range(depth):
            x_TSD = table_block(w, config, i, x_TSD, rows, rows_temporal, text)
        shift, scale = w["final_layer.scale_shift_table"] + t_D
        values = linear(w, "final_layer.linear", modulated_norm(x_TSD, shift, scale))
        outputs.append(assemble(values, grid, config.patch_size, latents))
    return torch.stack(outputs)


# -- What the tests of every model share


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every weight and buffer, also in those that start at zero; float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for name, value in model.state_dict().items():
        fan_in = value[0].numel() if value.dim() > 1 else 25
        value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
        if name.endswith("norm.weight"):
            value.add_(1)
    return model


def leaves(model: torch.nn.Module) -> Weights:
    """Copies of all parameters that take gradients of their own, and the buffers."""
    parameters = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    return parameters | dict(model.named_buffers())


def assert_same_gradients(
    model: torch.nn.Module, out: Tensor, weights: Weights, expected: Tensor
) -> None:
    """Compare outputs, and every parameter's gradient by name, for one random output gradient."""
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    gradients = torch.autograd.grad((out * direction).sum(), [parameters[n] for n in names])
    references = torch.autograd.grad((expected * direction).sum(), [weights[n] for n in names])
    for name, gradient, reference in zip(names, gradients, references, strict=True):
        scale = reference.abs().max().clamp(min=1e-3)
        worst = ((gradient - reference).abs().max() / scale).item()
        assert worst < 1e-6, f"gradient of {name} is off by {worst:.1e} of its largest value"
