"""The peak of a GPU's memory in a training step, by formula: what is kept, counted in tensors.

One tensor of tokens is tokens · D values in the precision of the computation. Counts are those of
the fused operations (docs/kernels.md), encoders are not part of it, and neither is what the driver
and NCCL take beside PyTorch.

Letters as in the models: D hidden size, T patches in time, S patches per frame, N = T · S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longtake.planning.tokens import TokenGrid, has_full_attention

GIB = 2**30
_FP32 = 4
# Weights and averages, and two moments of AdamW.
_STATE_BYTES = 4 * _FP32
# Units whose weights are gathered at a time where they are freed in between: the one that computes,
# the next, and one whose memory is not yet reused.
_GATHERED_UNITS = 3
# Tensors of latents, fp32, when a loss is computed, noise and prediction (mean and variance) among
# them.
_LATENTS_OF_LOSS = {"iddpm": 26, "flow": 7}
# From then on: the clean ones, and a half of the embedding's patches in bf16.
_LATENTS_OF_STEP = 1.5
# Inputs of blocks on the device where they are offloaded: the one computed again with, and the one
# that has not left or comes back.
_OFFLOADED_INPUTS = 2
# A sample of so many tokens per input of attention's output layer has the gate in the layer's
# weights (longtake.ops.gated_product), and the layer's output is not kept.
FOLDING_TOKENS_PER_INPUT = 2
# From so many keys on, what attention in a nested branch found is kept from when its block is
# computed again (longtake.ops.attended).
KEPT_KEYS = 1024
# Gradients of the stream: the one that came to a branch, and the one that it gives.
_GRADIENTS = 2
# A stream on its way between processes: what is sent or has been copied out of what arrived, what
# arrived, and the same in order.
_EXCHANGE = 3


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
    on_host: float = 0
    """Pinned host memory for inputs of blocks that are offloaded; no part of the total."""

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.gradients + self.kept + self.working

    def __str__(self) -> str:
        on_host = f"; pinned in host memory {self.on_host / GIB:.1f}" if self.on_host else ""
        return (
            f"predicted peak {self.total / GIB:.1f} GiB, without encoders: weights, averages and "
            f"moments {self.states / GIB:.1f}, gathered weights {self.gathered / GIB:.1f}, "
            f"gradients {self.gradients / GIB:.1f}, kept for the backward {self.kept / GIB:.1f}, "
            f"working set {self.working / GIB:.1f}{on_host}"
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
    keys: int = 0
    """How many of them a token sees."""

    @property
    def keeps_attended(self) -> bool:
        """Whether in pieces it keeps what its attention found."""
        return self.is_attention and self.keys >= KEPT_KEYS

    def with_folded_gate(self, tokens_per_width: float) -> _Branch:
        """The same where the gate goes into the weights, for samples of so many tokens in hidden
        sizes."""
        return replace(self, kept=self.kept - 1) if self.folds(tokens_per_width) else self

    def folds(self, tokens_per_width: float) -> bool:
        """Whether the gate does."""
        return self.is_attention and tokens_per_width >= FOLDING_TOKENS_PER_INPUT


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
    objective: str = "iddpm",
    offload: bool = False,
    kept_inputs: int = 0,
    kept_blocks: int = 0,
    pieces: str = "all",
    zero: int = 2,
    shards: int = 1,
    blocks_per_unit: int = 1,
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

    where attention's gate goes into weights, one less ("projected"), and a weight a sample.

    "selective" computes normalized tokens and the GELU again: one less a norm, r less for the MLP.
    "full" keeps a block's input, and one block as "none" does; "nested" keeps a block's input and,
    of one block, the inputs of its branches, and what self-attention over KEPT_KEYS or more found,
    a tensor and a number per head and token; with pieces "pointwise" what its self-attention keeps
    in place of their inputs. Counted are the fused operations: with others, and in rings, it is
    computed once more and not kept. Offloaded, two inputs of blocks are there, or the last
    kept_inputs. Of kept_blocks blocks at the end "selective" keeps what it does; they are done with
    when the first checkpointed one is computed again.

    The MLP's backward, which begins a block's, adds one gradient of the inner tensor and four
    others: r + 4; 3r + 2 where the GELU is computed again. Nested, it is that of a piece,
    its forward included, beside the two of the stream. With sp a nested block may hold more when it
    is computed again and its stream comes back from the temporal branch: three buffers, the stream
    that went there, and one gradient, but no inputs of branches behind. Full attention is one piece
    and may hold more in its backward: 11 tensors, 17 with sp, again without those inputs, and
    without what it found where that is kept.

    Five moments are compared: the loss, when all is kept, the final layer's input with it; the turn
    to the backward, which brings the last block's working set and a gradient in place of that
    input; the first block's backward, when all gradients but its unit's are there; the reduction of
    that unit's, in both dtypes; and the embedding, whose tokens sp does not split.

    latent_values are those of the micro-batch. shards are the processes that share one copy of the
    weights. Raises ValueError for an unknown model, policy or objective.
    """
    rows = grid.total if has_full_attention(model) else grid.time
    tokens_of_sample = -(-rows // sp) * (grid.total // rows)
    tokens_per_width = tokens_of_sample / hidden_size if hidden_size else 0
    tokens = micro_batch * tokens_of_sample
    tensor = tokens * hidden_size * bytes_per_value
    branches = [b.with_folded_gate(tokens_per_width) for b in _branches(model, grid, mlp_ratio)]
    folded = sum(branch.folds(tokens_per_width) for branch in branches)

    def rows_of(some: list[_Branch]) -> float:
        return (
            _FP32 * tokens * sum(num_heads * branch.log_sums + 2 * branch.norms for branch in some)
        )

    text = micro_batch * text_tokens * 2 * hidden_size * bytes_per_value
    text = text if any(branch.kept == 3 for branch in branches) else 0
    weights_of_samples = micro_batch * folded * hidden_size**2 * bytes_per_value
    beside = rows_of(branches) + text + weights_of_samples
    own = sum(b.kept for b in branches) * tensor + beside  # of one block
    selective = own - sum(b.again for b in branches) * tensor
    backward = (mlp_ratio + 4) * tensor
    selective_backward = (3 * mlp_ratio + 2) * tensor
    checkpointed = depth - kept_blocks
    late = min(_OFFLOADED_INPUTS, checkpointed) if offload else 1  # at the first block's backward
    inputs = min(max(late, kept_inputs), checkpointed) if offload else checkpointed
    other_inputs = (inputs - 1) * tensor  # than that of the block computed again
    late_inputs = (late - 1) * tensor
    # The last checkpointed block's leaves only when another follows, and none does.
    on_host = max(0, checkpointed - max(1, kept_inputs)) * tensor if offload else 0
    match checkpointing:
        case "none":
            kept, first, working = depth * own, own, backward
        case "selective":
            kept, first, working = depth * selective, selective, selective_backward
        case "full":
            kept, first, working = other_inputs + own, late_inputs + own, backward
        case "nested":
            whole = [b for b in branches if b.is_attention] if pieces == "pointwise" else []
            in_pieces = [branch for branch in branches if branch not in whole]
            again = (sum(b.kept for b in whole) + len(in_pieces)) * tensor + rows_of(whole)
            attended = sum(branch.keeps_attended for branch in in_pieces)
            again += attended * (tensor + _FP32 * tokens * num_heads)
            kept, first = other_inputs + again, late_inputs + again
            share = min(1, piece_tokens / tokens)
            working = _nested_working(branches, in_pieces, share, mlp_ratio, sp) * tensor
        case _:
            raise ValueError(
                f"checkpointing={checkpointing} has no formula: expected none, selective, full or "
                "nested"
            )
    if kept_blocks:
        at_loss = inputs * tensor + kept_blocks * selective
        if at_loss + selective_backward > kept + working:
            kept, working = at_loss, selective_backward
    elif checkpointing in ("full", "nested"):
        at_loss = inputs * tensor
    else:
        at_loss = kept

    states = _STATE_BYTES * parameters / shards
    per_unit = min(blocks_per_unit, depth)
    unit = per_unit * block_parameters
    root = (parameters - depth * block_parameters) * bytes_per_value
    # The last message's memory stays beside what was copied out of it.
    blocks_gathered = depth + per_unit if shards > 1 else depth
    if zero == 3 and shards > 1:
        blocks_gathered = min(_GATHERED_UNITS * per_unit, blocks_gathered)
    gathered = root + blocks_gathered * block_parameters * bytes_per_value
    reduced = _FP32 * parameters / shards
    # Of earlier micro-batches: sums that are reduced every time, or once.
    earlier = 0 if accumulation == 1 else reduced if zero >= 2 else _FP32 * parameters
    of_latents = _FP32 * latent_values
    if objective not in _LATENTS_OF_LOSS:
        raise ValueError(
            f"objective={objective} has no formula: expected one of {', '.join(_LATENTS_OF_LOSS)}"
        )
    loss = PeakMemory(
        states=states,
        gathered=gathered,
        gradients=earlier,
        kept=at_loss + tensor,
        working=_LATENTS_OF_LOSS[objective] * of_latents,
        on_host=on_host,
    )
    turn = replace(loss, kept=kept, working=working + _LATENTS_OF_STEP * of_latents)
    gradients = max(reduced, earlier)
    of_unit = bytes_per_value * unit
    if shards > 1:
        # Units whose backward is done are freed; the last of them may still be on its way.
        before = _FP32 * unit if depth > per_unit else 0
        others = gradients + before - (_FP32 * unit / shards if accumulation == 1 else 0)
        first_block = replace(turn, gathered=root + of_unit, gradients=others + of_unit, kept=first)
        reduction = replace(
            turn, gathered=root, gradients=others + of_unit + _FP32 * unit, kept=tensor, working=0
        )
    else:  # the sum over one process is what is reduced, and what is gathered stays
        first_block = replace(turn, gradients=gradients + of_unit, kept=first)
        reduction = first_block
    whole_stream = micro_batch * grid.total * hidden_size * bytes_per_value
    # The embedded patches and the same with their positions; noise and noisy latents beside.
    embedding = replace(
        first_block, kept=0, working=2 * whole_stream + (2 + _LATENTS_OF_STEP) * of_latents
    )
    return max(loss, turn, first_block, reduction, embedding, key=lambda moment: moment.total)


def _nested_working(
    branches: list[_Branch], in_pieces: list[_Branch], share: float, mlp_ratio: float, sp: int
) -> float:
    """Tensors of tokens that a nested block holds beside what it keeps, a piece being such a share
    of them: in its MLP's backward or about its last attention."""
    in_mlp = _GRADIENTS + share * (branches[-1].kept + 2 + mlp_ratio)
    # Inputs of branches behind it are done with in its backward, and not there before.
    behind = next(n for n, branch in enumerate(reversed(branches)) if branch.is_attention)
    attention = branches[-1 - behind]
    if attention.is_cut:
        # Back from it the stream is exchanged; the one that went there and a gradient are held.
        in_attention = _EXCHANGE + 1 + 1 if sp > 1 else 0
    elif attention in in_pieces:
        # All of it at once: forward, a gradient before and three behind, and q, k and v twice more
        # where they are exchanged. What it found may be kept already.
        in_attention = 7 + 1 + 3 + (6 if sp > 1 else 0) - attention.keeps_attended
    else:
        in_attention = 0
    return max(in_mlp, in_attention - behind)


def _branches(model: str, grid: TokenGrid, mlp_ratio: float) -> list[_Branch]:
    mlp = _Branch(kept=3 + 2 * mlp_ratio, again=1 + mlp_ratio, norms=1, is_attention=False)
    spatial = _Branch(kept=7, again=1, log_sums=1, norms=1, keys=grid.space)
    full = replace(spatial, is_cut=False, keys=grid.total)
    text = _Branch(kept=3, log_sums=1, is_attention=False)
    match model:
        case "dit":
            return [full, mlp]
        case "latte":
            # Every second block's sees along time instead.
            return [replace(spatial, keys=max(grid.space, grid.time)), mlp]
        case "pixart":
            return [full, text, mlp]
        case "stdit":
            return [spatial, _Branch(kept=6, keys=grid.time), text, mlp]
        case "stdit2":
            normalized = _Branch(kept=10, again=1, log_sums=1, norms=1, keys=grid.space)
            return [normalized, replace(normalized, keys=grid.time), text, mlp]
        case _:
            raise ValueError(
                f"model={model} has no formula for memory: expected one of dit, latte, pixart, "
                "stdit, stdit2"
            )
