"""FSDP2: weights, gradients and optimizer state spread over the processes; and full tensors in and
out."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_blocks(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reshard_after_forward: bool,
    accumulate_shards: bool = True,
    blocks_per_unit: int = 1,
) -> None:
    """Shards blocks, so many as one unit, and the rest of the model as the root unit, in place.

    A mesh of one axis shards over it; of two axes it replicates over the first and shards over the
    second. A unit's weights are gathered while the one before it computes, in the forward and in
    the backward. accumulate_shards: whether the gradients of micro-batches are reduced before they
    add up (`sync_gradients`). Weights stay fp32 in the shards, are gathered in `param_dtype`, and
    gradients are averaged in fp32. Inputs are not cast: the models do that where it is right, and
    keep timesteps and positions in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # PyTorch 2.13 warns of blocks that return a view: an operation in place on it would lose FSDP's
    # hook. No model has one.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)
    blocks, units = list(blocks), []
    for first in range(0, len(blocks), blocks_per_unit):
        together = blocks[first : first + blocks_per_unit]
        fully_shard(
            together, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
        units.append(together[0])  # speaks for all of its unit
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
    # The root's weights are the first that the backward needs: freeing them would gain nothing.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size(mesh.ndim - 1) == 1:
        for unit in (*units, model):
            assert isinstance(unit, FSDPModule)
            # What is gathered stays: the update writes it together with the weights.
            unit.set_reshard_after_backward(False, recurse=False)
            # The interface has no public name to derive from.
            unit.set_custom_reduce_scatter(_NothingToScatter())  # pyright: ignore[reportArgumentType]
    model.accumulate_shards = accumulate_shards  # pyright: ignore[reportArgumentType]


class _NothingToScatter:
    """Spares a lone shard's gradients a copy: the sum over one process is what it was given.

    FSDP asks for the sum's memory right after that of what goes into it, and copies from one to the
    other unless they are the same.
    """

    def __init__(self) -> None:
        # Gone with a reduction that breaks off between the two.
        self._given: Callable[[], Tensor | None] = lambda: None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for a unit's gradients, or the same once more for their sum."""
        given, self._given = self._given(), lambda: None
        if given is not None and (*given.shape, given.dtype) == (*size, dtype):
            if device.type == "cuda":
                # FSDP reads the sum on a stream of its own, the current one here.
                given.record_stream(torch.cuda.current_stream(device))
            return given
        made = torch.empty(*size, dtype=dtype, device=device)
        self._given = weakref.ref(made)
        return made

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Never called by FSDP for one process."""
        raise AssertionError("there is no other process to reduce with")


def sync_gradients(model: nn.Module, is_last: bool) -> None:
    """Call before each micro-batch's forward: says how its gradients join those before.

    Either all are reduced and add up as shards, in fp32: a reduction per micro-batch (ZeRO-2, -3).
    Or only the last's sum is: those before add up whole, in fp32, which costs their memory and
    saves their reductions (ZeRO-0, -1).
    """
    assert isinstance(model, FSDPModule), "sync_gradients needs a model from parallelize"
    model.set_requires_gradient_sync(is_last or bool(model.accumulate_shards))
    # Between replicas, which may be on other machines, the sum of all is reduced once.
    model.set_requires_all_reduce(is_last)
    model.set_is_last_backward(is_last)


def drop_gathered(model: nn.Module) -> None:
    """Frees weights that are still gathered, so that the model shows its shards.

    Call it before reading parameters or their gradients, and after changing weights outside the
    optimizer: a forward without a backward (validation, sampling) leaves the root's gathered copy
    behind, a lone shard keeps all of them, and the next forward would use these.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_copies(model: nn.Module, params: Mapping[str, Tensor]) -> list[Tensor] | None:
    """What is still gathered of these parameters, whole and in the dtype of computation, in their
    order; or None, and nothing of the model is gathered any more.

    One of both between a backward and the next forward, and a lone shard has the first: whoever
    changes the parameters then writes these, too, and need not gather them again.
    """
    shown = dict(model.named_parameters())
    is_gathered = [shown[name] is not param for name, param in params.items()]
    if all(is_gathered):
        return [shown[name].detach() for name in params]
    if any(is_gathered):
        drop_gathered(model)
    return None


@torch.no_grad()
def write_full(param: Tensor, full: Tensor) -> None:
    """Writes a full tensor, the same on every process, into a parameter or buffer that may be
    sharded.

    Raises: ValueError if the shapes differ. Nothing is sent: each process keeps its own part.
    """
    if param.shape != full.shape:
        raise ValueError(f"shape {tuple(full.shape)} does not fit {tuple(param.shape)}")
    if isinstance(param, DTensor):
        part = distribute_tensor(
            full.to(param.to_local().device, param.dtype),
            param.device_mesh,
            param.placements,
            src_data_rank=None,
        )
        param.to_local().copy_(part.to_local())
    else:
        param.copy_(full)


@torch.no_grad()
def read_full(param: Tensor) -> Tensor:
    """The full tensor of a parameter or buffer that may be sharded; all processes must call it."""
    return param.full_tensor() if isinstance(param, DTensor) else param.detach().clone()


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local_part` of each, in a tenth of the time: entering `no_grad` takes the rest."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of tensors as one long vector, (), fp32; the same on all processes, no host waits.

    They are sharded alike, or not at all. Works on the local parts, all in one kernel, which spares
    the host DTensor's bookkeeping for each of some hundred tensors.
    """
    norms = torch._foreach_norm(local_parts(tensors))  # pyright: ignore[reportPrivateImportUsage]
    squared = torch.stack(norms).float().square().sum()
    return sum_over_shards(squared, tensors[0]).sqrt()


@torch.no_grad()
def sum_over_shards(value: Tensor, sharded: Tensor) -> Tensor:
    """The sum of a value over the processes that each hold a shard of this tensor, in place; no
    host waits."""
    if isinstance(sharded, DTensor):
        for axis, placement in enumerate(sharded.placements):
            if placement.is_shard() and sharded.device_mesh.size(axis) > 1:
                dist.all_reduce(value, group=sharded.device_mesh.get_group(axis))
    return value


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives a model built on the meta device memory on its real one, filled with NaN.

    NaN, so that a weight which the initialization forgets shows in the first loss. All buffers must
    be persistent, since nothing could recompute the others.
    """
    persistent = model.state_dict().keys()
    for name, _ in model.named_buffers():
        assert name in persistent, f"buffer {name} is not persistent: compute it in the forward"
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                local_part(tensor).fill_(float("nan"))
