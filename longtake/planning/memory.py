"""The peak of a GPU's memory in a training step, by formula: what is kept, counted in tensors.

One tensor of tokens is tokens · D values in the precision of the computation. Counts are those of
the fused operations (docs/kernels.md), encoders are not part of it, and neither is what the driver
and NCCL take beside PyTorch.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from longtake.planning.tokens import TokenGrid, has_full_attention

GIB = 2**30
_FP32 = 4
# Weights and averages, and two moments of AdamW.
_STATE_BYTES = 4 * _FP32
# Blocks whose weights are gathered at a time where they are freed in between: the one that
# computes, the next, and one whose memory is not yet reused.
_GATHERED_BLOCKS = 3
# Clean latents, noise, their sum, target, prediction (mean and variance) and what the loss makes.
_TENSORS_OF_LATENTS = 10
# Inputs of blocks on the device where they are offloaded: one computed with, one leaving or coming,
# one ahead.
_OFFLOAD_DEPTH = 3


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of one process at the fullest moment of a step."""

    states: float
    """Weights, averages and moments, fp32, as this process holds them."""
    gathered: float
    """Whole weights, in the precision of the computation."""
    gradients: float
    kept: float
    """What forwards keep for their backwards."""
    working: float
    """What the block that computes holds beside that."""

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.gradients + self.kept + self.working

    def __str__(self) -> str:
        return (
            f"predicted peak {self.total / GIB:.1f} GiB, without encoders: weights, averages and "
            f"moments {self.states / GIB:.1f}, gathered weights {self.gathered / GIB:.1f}, "
            f"gradients {self.gradients / GIB:.1f}, kept for the backward {self.kept / GIB:.1f}, "
            f"working set {self.working / GIB:.1f}"
        )


@dataclass(frozen=True)
class _Branch:
    """Tensors of tokens that a branch keeps, its input among them, and what else there is of it."""

    kept: float
    again: float = 0
    """Of those, how many "selective" computes again."""
    log_sums: int = 0
    """Attentions whose logarithms of sums are kept, a number per head and token."""
    norms: int = 0
    is_cut: bool = True
    """Whether it can run in pieces."""
    is_attention: bool = True
    """Whether its tokens see each other."""


def peak_memory(
    model: str,
    grid: TokenGrid,
    *,
    hidden_size: int,
    num_heads: int,
    depth: int,
    parameters: int,
    block_parameters: int,
    micro_batch: int,
    latent_values: int,
    checkpointing: str,
    offload: bool = False,
    kept_blocks: int = 0,
    pieces: str = "all",
    zero: int = 3,
    shards: int = 1,
    sp: int = 1,
    accumulation: int = 1,
    text_tokens: int = 120,
    mlp_ratio: float = 4.0,
    piece_tokens: int = 2**16,
    bytes_per_value: int = 2,
) -> PeakMemory:
    """The fullest moment of a step, with fused kernels.

    A branch keeps, in tensors of tokens (r = mlp_ratio, 4):

        self-attention       7       x, normalized x, q k v, attended, projected
        its temporal kind    6       in stdit: nothing is normalized
        with q, k norms      10      in stdit2: q, k and v once more
        attention to text    3       x, q, attended
        MLP                  3 + 2r  x, normalized x, inner before and after GELU, projected

    "selective" computes normalized tokens and the GELU again: one less a norm, r less for the MLP.
    "full" keeps a block's input, and one block as "none" does; "nested" keeps a block's input, the
    inputs of one block's branches, two gradients and one piece of a branch, and with pieces
    "pointwise" what its self-attention keeps; offloaded, three blocks' inputs. Of kept_blocks
    blocks at the end "selective" keeps what it does; they are done with when the first checkpointed
    one is computed again. The MLP's backward, which begins a block's, adds two gradients of the
    inner tensor and one of the stream: 2r + 1, and r more where the GELU is computed again.

    Three moments are compared: the turn from forward to backward, when everything is kept; the
    first block's backward, when all gradients are there; and that of the embedding, whose tokens
    sp does not split.

    latent_values are those of the micro-batch. shards are the processes that share one copy of the
    weights. Raises ValueError for an unknown model or policy.
    """
    branches = _branches(model, mlp_ratio)
    rows = grid.total if has_full_attention(model) else grid.time
    tokens = micro_batch * -(-rows // sp) * (grid.total // rows)
    tensor = tokens * hidden_size * bytes_per_value

    of_rows = _FP32 * tokens * sum(num_heads * b.log_sums + 2 * b.norms for b in branches)
    text = micro_batch * text_tokens * 2 * hidden_size * bytes_per_value
    text = text if any(branch.kept == 3 for branch in branches) else 0
    own = sum(branch.kept for branch in branches) * tensor + of_rows + text  # of one block
    backward = (2 * mlp_ratio + 1) * tensor
    selective = own - sum(branch.again for branch in branches) * tensor
    selective_backward = backward + mlp_ratio * tensor
    checkpointed = depth - kept_blocks
    inputs = min(_OFFLOAD_DEPTH, checkpointed) if offload else checkpointed
    match checkpointing:
        case "none":
            kept, first, working = depth * own, own, backward
        case "selective":
            kept, first, working = depth * selective, selective, selective_backward
        case "full":
            kept, first, working = (inputs - 1) * tensor + own, own, backward
        case "nested":
            whole = [b for b in branches if b.is_attention] if pieces == "pointwise" else []
            in_pieces = [branch for branch in branches if branch not in whole]
            # Whole branches are done with after those in pieces, whose inputs are free by then.
            of_whole = sum(branch.kept for branch in whole) * tensor + bool(whole) * of_rows
            kept = (inputs - 1 + len(in_pieces)) * tensor + of_whole
            first = len(in_pieces) * tensor + of_whole
            exchange = 3 if sp > 1 else 0
            piece = max(
                (branch.kept + 2 * mlp_ratio + 1 + 3)
                * (min(1, piece_tokens / tokens) if branch.is_cut else 1)
                for branch in in_pieces
            )
            if whole:  # the gradients of what was attended to and of q, k and v
                piece = max(piece, 4 - len(in_pieces))
            working = (2 + exchange + piece) * tensor
        case _:
            raise ValueError(
                f"checkpointing={checkpointing} has no formula: expected none, selective, full or "
                "nested"
            )
    if kept_blocks:
        of_kept = inputs * tensor + kept_blocks * selective
        if of_kept + selective_backward > kept + working:
            kept, working = of_kept, selective_backward

    states = _STATE_BYTES * parameters / shards
    is_freed = zero == 3 and shards > 1
    blocks_gathered = min(_GATHERED_BLOCKS, depth) if is_freed else depth
    gathered = (parameters - (depth - blocks_gathered) * block_parameters) * bytes_per_value
    reduced = _FP32 * parameters / shards
    # Of earlier micro-batches: sums that are reduced every time, or once.
    earlier = 0 if accumulation == 1 else reduced if zero >= 2 else _FP32 * parameters
    outside = _TENSORS_OF_LATENTS * latent_values * _FP32
    at_turn = PeakMemory(
        states=states,
        gathered=gathered,
        gradients=earlier,
        kept=kept + tensor,  # the final layer keeps its input
        working=working + outside,
    )
    in_flight = 2 * block_parameters * (bytes_per_value + _FP32)
    at_first = PeakMemory(
        states=states,
        gathered=gathered,
        gradients=max(reduced, earlier) + in_flight,
        kept=first,
        working=working + outside,
    )
    at_embedding = PeakMemory(
        states=states,
        gathered=gathered,
        gradients=max(reduced, earlier) + in_flight,
        kept=0,
        working=3 * micro_batch * grid.total * hidden_size * bytes_per_value + outside,
    )
    return max(at_turn, at_first, at_embedding, key=lambda moment: moment.total)


def _branches(model: str, mlp_ratio: float) -> list[_Branch]:
    mlp = _Branch(kept=3 + 2 * mlp_ratio, again=1 + mlp_ratio, norms=1, is_attention=False)
    spatial = _Branch(kept=7, again=1, log_sums=1, norms=1)
    full = _Branch(kept=7, again=1, log_sums=1, norms=1, is_cut=False)
    text = _Branch(kept=3, log_sums=1, is_attention=False)
    match model:
        case "dit":
            return [full, mlp]
        case "latte":
            return [spatial, mlp]
        case "pixart":
            return [full, text, mlp]
        case "stdit":
            return [spatial, _Branch(kept=6), text, mlp]
        case "stdit2":
            normalized = _Branch(kept=10, again=1, log_sums=1, norms=1)
            return [normalized, normalized, text, mlp]
        case _:
            raise ValueError(
                f"model={model} has no formula for memory: expected one of dit, latte, pixart, "
                "stdit, stdit2"
            )
