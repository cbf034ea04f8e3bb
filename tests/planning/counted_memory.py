"""What a step on one of several GPUs holds at its fullest moment, counted by tensors without data.

The real model is made parallel by the real code; only that its tensors have no values, and that
the other processes are made up. So any size can be counted on a CPU, in the time that its operators
take to be called. Not seen is what kernels and libraries hold inside.
"""

from __future__ import annotations

import math
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.benchmark.inputs import latent_shape
from longtake.config import RunConfig, predicted_peak
from longtake.diffusion import DiffusionConfig, build_objective
from longtake.models import Model, build_model_from_config
from longtake.ops.attended import keeps_attended
from longtake.ops.kernels import KernelConfig, kernels_as
from longtake.parallel import build_mesh, local_part, parallelize, stop_distributed
from longtake.planning import PeakMemory

_EMPTY = torch.ops.aten.empty.memory_format
_ATTENTION = torch.ops.longtake.flash_attention.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default
# Those whose results have shapes for tensors without data on any machine.
_KERNELS = KernelConfig(
    elementwise="triton",
    self_attention="triton",
    temporal_attention="sdpa",
    cross_attention="triton",
)


def count_and_predict(config: RunConfig) -> tuple[int, PeakMemory]:
    """Bytes beside weights, averages and moments, of the first process of a group of `parallel.sp`
    that trains on one clip of the first bucket in bf16; and what is predicted of it."""
    how = replace(config.parallel, compile=False, param_dtype="bf16")
    config = replace(config, parallel=how, kernels=_KERNELS)
    latents = latent_shape(config, config.data.buckets[0])
    with _made_up_processes(how.sp):
        mesh = build_mesh(how, torch.device("cpu"))
        with torch.device("meta"):
            model = build_model_from_config(config.model)
        predicted = predicted_peak(config, mesh, model, latents, micro_batch=1)
        assert predicted is not None
        parallelize(model, mesh, how)
        with FakeTensorMode(allow_non_fake_inputs=True), kernels_as(_KERNELS):
            model.to_empty(device="cpu")
            with _Held([local_part(param) for param in model.parameters()]) as held:
                _step(model, config, latents)
        return held.peak, predicted


def count_loss(config: DiffusionConfig) -> float:
    """What a loss holds until its backward, in tensors of latents, fp32."""
    objective, shape = build_objective(config), (1, 16, 64, 64, 64)
    channels = 2 * shape[1] if objective.learn_sigma else shape[1]
    with FakeTensorMode(allow_non_fake_inputs=True), _Held([]) as held:
        objective.loss(
            lambda noisy_BCTHW, t_B: torch.zeros(1, channels, *shape[2:], requires_grad=True),
            torch.zeros(shape),
            noise_BCTHW=torch.zeros(shape),
            t_B=objective.draw_t(torch.zeros(1), num_frames=1, height=256, width=256),
        )
    return held.peak / (4 * math.prod(shape))


def _step(model: Model, config: RunConfig, latents: tuple[int, int, int, int]) -> None:
    """Forward and backward of one clip, as training makes them."""
    tokens, width = config.model.max_caption_tokens, config.model.caption_channels
    condition = {
        "prompt_embeds_BLK": torch.zeros(1, tokens, width, dtype=torch.bfloat16),
        "prompt_mask_BL": torch.ones(1, tokens, dtype=torch.bool),
    }
    objective = build_objective(config.diffusion)
    clean_BCTHW = torch.zeros(1, *latents)  # held by the batch until the step is done
    loss_B = objective.loss(
        lambda noisy_BCTHW, t_B: model(noisy_BCTHW, t_B, **condition),
        clean_BCTHW,
        noise_BCTHW=torch.zeros(1, *latents),
        t_B=objective.draw_t(torch.zeros(1), num_frames=1, height=256, width=256),
    )
    loss_B.mean().backward()


@contextmanager
def _made_up_processes(count: int):
    # What is without data has no address either; where a tensor lies tells it as well.
    address = Tensor.data_ptr
    Tensor.data_ptr = lambda self: self.untyped_storage()._cdata  # pyright: ignore
    stop_distributed()  # of a run that this process had before
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        Tensor.data_ptr = address


class _Held(TorchDispatchMode):
    """Counts bytes that are allocated within the context and not yet freed, on the device."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}
        self._resized: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs: Any = None):
        if func is _WAIT:
            return args[0]  # as with data; without, it would be a tensor of its own
        # What it is with data keeps what it found; without, another function is called.
        run = keeps_attended(func) if func is _ATTENTION else func
        out = run(*args, **(kwargs or {}))
        if func is _EMPTY and _is_in("init_all_gather_outputs", "_fsdp_param.py"):
            # Weights are freed and gathered again in the same storage.
            self._resized.append(out.untyped_storage())
            self._known.add(out.untyped_storage()._cdata)
        elif func is _EMPTY and _is_in("_send", "offload.py"):
            self._note(out.untyped_storage(), 0)  # in host memory
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), leaf.untyped_storage().nbytes())
        gathered = sum(storage.nbytes() for storage in self._resized)
        self.peak = max(self.peak, self._bytes + gathered)
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        place = storage._cdata
        if place in self._known:
            return
        self._known.add(place)
        self._bytes += size
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._bytes -= size


def _is_in(function: str, file: str) -> bool:
    """Whether one of the calls that led here is of that function."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == function and code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False
