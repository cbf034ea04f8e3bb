"""The public layouts: which names and buffers a checkpoint has, and how they map onto our models.

Our parameters carry the names of the original files (DiT, PixArt, Open-Sora 1.0, Latte), so those
layouts only say which position buffers a file may contain besides. diffusers' names differ: one
table of rules per model serves reading and writing. A layout is recognized by the keys, never by a
file's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from longtake.models.config import ModelName
from longtake.weights.read import WeightsError

LayoutName = Literal[
    "dit",
    "latte",
    "pixart",
    "stdit",
    "stdit2",
    "opensora-dit",
    "opensora-pixart",
    "diffusers-dit",
    "diffusers-pixart",
]


@dataclass(frozen=True)
class Rule:
    """How one of our tensors is made of a file's; `{i}` stands for the number of the block.

    rename: one tensor under another name. join: the sources' rows one after the other. copies: the
    source repeated in every block `{j}` with equal values.
    """

    target: str
    sources: tuple[str, ...]
    how: Literal["rename", "join", "copies"]


@dataclass(frozen=True)
class Layout:
    """A way in which a model's weights are published."""

    name: LayoutName
    model: ModelName
    title: str
    # Buffers that our models compute for each shape instead of storing them.
    positions: Mapping[str, Literal["space", "time"]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()  # empty: the names are ours
    # Keys of ours for which the layout has no place, and what that means for the reader.
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One of our tensors and where in a file it is."""

    target: str
    sources: tuple[str, ...]
    how: Literal["same", "rename", "join", "copies"]

    def shape(self, state: Mapping[str, Tensor]) -> torch.Size:
        """The shape that `read` will return."""
        first = state[self.sources[0]].shape
        if self.how != "join" or not first:
            return first
        rows = sum(len(state[source]) if state[source].dim() else 0 for source in self.sources)
        return torch.Size((rows, *first[1:]))

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself."""
        if self.how == "join":
            return torch.cat([state[source] for source in self.sources])
        return state[self.sources[0]]


# ------------------------------------------------------------------------------- diffusers' names


def _linear(target: str, *sources: str) -> tuple[Rule, ...]:
    """Weight and bias of a layer; several sources are joined."""
    how = "join" if len(sources) > 1 else "rename"
    return tuple(
        Rule(f"{target}.{part}", tuple(f"{source}.{part}" for source in sources), how)
        for part in ("weight", "bias")
    )


def _repeated(target: str, source: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{target}.{part}", (f"transformer_blocks.{{j}}.{source}.{part}",), "copies")
        for part in ("weight", "bias")
    )


_BLOCK = "transformer_blocks.{i}"
_SELF_ATTENTION_AND_MLP = (
    *_linear(
        "blocks.{i}.attn.qkv",
        f"{_BLOCK}.attn1.to_q",
        f"{_BLOCK}.attn1.to_k",
        f"{_BLOCK}.attn1.to_v",
    ),
    *_linear("blocks.{i}.attn.proj", f"{_BLOCK}.attn1.to_out.0"),
    *_linear("blocks.{i}.mlp.fc1", f"{_BLOCK}.ff.net.0.proj"),
    *_linear("blocks.{i}.mlp.fc2", f"{_BLOCK}.ff.net.2"),
)
# Each block of diffusers' DiT embeds timestep and label by itself, with the same weights.
_DIFFUSERS_DIT = (
    *_linear("x_embedder.proj", "pos_embed.proj"),
    *_repeated("t_embedder.mlp.0", "norm1.emb.timestep_embedder.linear_1"),
    *_repeated("t_embedder.mlp.2", "norm1.emb.timestep_embedder.linear_2"),
    Rule(
        "y_embedder.embedding_table.weight",
        ("transformer_blocks.{j}.norm1.emb.class_embedder.embedding_table.weight",),
        "copies",
    ),
    *_SELF_ATTENTION_AND_MLP,
    *_linear("blocks.{i}.adaLN_modulation.1", f"{_BLOCK}.norm1.linear"),
    *_linear("final_layer.adaLN_modulation.1", "proj_out_1"),
    *_linear("final_layer.linear", "proj_out_2"),
)
_DIFFUSERS_PIXART = (
    *_linear("x_embedder.proj", "pos_embed.proj"),
    *_linear("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    *_linear("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    *_linear("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
    *_linear("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
    *_linear("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    *_linear("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
    *_linear("t_block.1", "adaln_single.linear"),
    *_linear("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    *_linear("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    Rule("blocks.{i}.scale_shift_table", (f"{_BLOCK}.scale_shift_table",), "rename"),
    *_SELF_ATTENTION_AND_MLP,
    *_linear("blocks.{i}.cross_attn.q_linear", f"{_BLOCK}.attn2.to_q"),
    *_linear("blocks.{i}.cross_attn.kv_linear", f"{_BLOCK}.attn2.to_k", f"{_BLOCK}.attn2.to_v"),
    *_linear("blocks.{i}.cross_attn.proj", f"{_BLOCK}.attn2.to_out.0"),
    Rule("final_layer.scale_shift_table", ("scale_shift_table",), "rename"),
    *_linear("final_layer.linear", "proj_out"),
)

NULL_CAPTION = "y_embedder.y_embedding"

# --------------------------------------------------------------------------------------- the table

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("dit", "dit", "DiT (Meta)", {"pos_embed": "space"}),
        Layout("latte", "latte", "Latte", {"pos_embed": "space", "temp_embed": "time"}),
        Layout("pixart", "pixart", "PixArt-alpha or -Sigma", {"pos_embed": "space"}),
        Layout(
            "stdit",
            "stdit",
            "Open-Sora 1.0 STDiT",
            {"pos_embed": "space", "pos_embed_temporal": "time"},
        ),
        Layout("stdit2", "stdit2", "Longtake's STDiT-2"),
        Layout(
            "opensora-dit",
            "dit",
            "Open-Sora 1.0 video DiT",
            {"pos_embed_spatial": "space", "pos_embed_temporal": "time"},
        ),
        Layout(
            "opensora-pixart",
            "pixart",
            "Open-Sora 1.0 video PixArt",
            {"pos_embed": "space", "pos_embed_temporal": "time"},
        ),
        Layout("diffusers-dit", "dit", "diffusers DiTTransformer2DModel", rules=_DIFFUSERS_DIT),
        Layout(
            "diffusers-pixart",
            "pixart",
            "diffusers PixArtTransformer2DModel",
            rules=_DIFFUSERS_PIXART,
            without={NULL_CAPTION: "diffusers has no null caption, it encodes the empty prompt"},
        ),
    )
}
assert tuple(LAYOUTS) == get_args(LayoutName)


def detect_layout(state: Mapping[str, Tensor]) -> LayoutName:
    """The layout of a checkpoint, from its keys.

    DiT and Latte differ by Latte's `temp_embed` only: without that buffer the answer is `dit`.

    Raises:
        WeightsError: no known layout, or one that no model of ours can hold, saying why.
    """
    keys = state.keys()
    if "transformer_blocks.0.attn1.to_q.weight" in keys:
        return _detect_diffusers(keys)
    if "blocks.0.attn_temp.qkv.weight" in keys:
        return "stdit2" if "blocks.0.attn_temp.q_norm.weight" in keys else "stdit"
    if {"t_block.1.weight", "blocks.0.cross_attn.q_linear.weight"} <= keys:
        return "opensora-pixart" if "pos_embed_temporal" in keys else "pixart"
    if "blocks.0.adaLN_modulation.1.weight" in keys:
        return _detect_adaln_zero(keys)
    sample = ", ".join(list(keys)[:4])
    known = ", ".join(layout.title for layout in LAYOUTS.values())
    raise WeightsError(f"unknown layout: keys such as {sample}; known are {known}")


def _detect_diffusers(keys: Iterable[str]) -> LayoutName:
    keys = set(keys)
    if any(key.startswith("temporal_transformer_blocks.") for key in keys):
        raise WeightsError(
            "diffusers' LatteTransformer3DModel is the text-to-video Latte (caption projection, "
            "cross-attention, one shared modulation); Longtake's latte is the class-conditional "
            "one, whose blocks diffusers does not have: use the original class-conditional file"
        )
    if "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in keys:
        return "diffusers-dit"
    if {"adaln_single.linear.weight", "caption_projection.linear_1.weight"} <= keys:
        return "diffusers-pixart"
    raise WeightsError(
        "unknown diffusers transformer: known are DiTTransformer2DModel, PixArtTransformer2DModel"
    )


def _detect_adaln_zero(keys: Iterable[str]) -> LayoutName:
    keys = set(keys)
    if "y_embedder.embedding_table.weight" not in keys:
        raise WeightsError(
            "a DiT or Latte without a label table (unconditional or with pooled text): "
            "Longtake's dit and latte are class-conditional"
        )
    if "temp_embed" in keys:
        return "latte"
    return "opensora-dit" if "pos_embed_spatial" in keys else "dit"


def find_pieces(layout: Layout, state: Mapping[str, Tensor]) -> tuple[list[Piece], list[str]]:
    """What a file offers to our model, and the keys which its layout does not explain.

    Raises:
        WeightsError: copies that the layout repeats in every block are not equal.
    """
    if not layout.rules:
        pieces = [Piece(key, (key,), "same") for key in state if key not in layout.positions]
        return pieces, []
    depth = num_blocks(state)
    pieces = [
        piece
        for piece in _expand(layout.rules, depth)
        if all(key in state for key in piece.sources)
    ]
    for piece in pieces:
        if piece.how == "copies":
            _check_copies(piece, state)
    explained = {source for piece in pieces for source in piece.sources} | set(layout.positions)
    # A key under our own name that the layout lacks is taken as it is.
    extra = [key for key in state if key in layout.without]
    pieces += [Piece(key, (key,), "same") for key in extra]
    return pieces, [key for key in state if key not in explained and key not in extra]


def rename_for(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the layout's names: `find_pieces` backwards, less the keys of `without`."""
    if not layout.rules:
        return dict(state)
    result: dict[str, Tensor] = {}
    for piece in _expand(layout.rules, num_blocks(state)):
        if piece.target not in state:
            continue
        value = state[piece.target]
        if piece.how == "join":
            for source, rows in zip(piece.sources, value.chunk(len(piece.sources)), strict=True):
                result[source] = rows
        else:
            result.update(dict.fromkeys(piece.sources, value))
    return result


def num_blocks(state: Iterable[str]) -> int:
    """How many different blocks the keys name; a stray high number does not make a deep model."""
    found = (re.match(r"(?:transformer_)?blocks\.(\d{1,4})\.", key) for key in state)
    return len({match[1] for match in found if match})


def _expand(rules: tuple[Rule, ...], depth: int) -> Iterable[Piece]:
    for rule in rules:
        if rule.how == "copies":
            sources = tuple(s.format(j=j) for s in rule.sources for j in range(depth))
            yield Piece(rule.target, sources, "copies")
        elif "{i}" in rule.target:
            for i in range(depth):
                sources = tuple(source.format(i=i) for source in rule.sources)
                yield Piece(rule.target.format(i=i), sources, rule.how)
        else:
            yield Piece(rule.target, rule.sources, rule.how)


def _check_copies(piece: Piece, state: Mapping[str, Tensor]) -> None:
    first = state[piece.sources[0]]
    for source in piece.sources[1:]:
        if first.dtype != state[source].dtype or not torch.equal(first, state[source]):
            raise WeightsError(
                f"{source} differs from {piece.sources[0]}: the model has one such tensor for all "
                "blocks, so blocks that were trained apart cannot be expressed"
            )
