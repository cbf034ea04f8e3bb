"""One configuration, measured: micro-batch found, steps timed, what they ran on written down."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from longtake.benchmark.inputs import latent_shape
from longtake.benchmark.protocol import quick, time_steps
from longtake.benchmark.records import Encoders, Measurement, Protocol, Timing, Trial
from longtake.benchmark.search import (
    DoesNotFit,
    best_micro_batch,
    first_micro_batch,
    memory_allows,
)
from longtake.benchmark.subject import Subject, Workload
from longtake.config import (
    RunConfig,
    kernels_by_layer,
    predicted_peak,
    verify_kernels,
    work_of_latents,
)
from longtake.models import build_model_from_config
from longtake.ops.kernels import PLAIN, kernels_as
from longtake.parallel import Mesh, ParallelConfig, compute_dtype, is_compiled, local_part
from longtake.pipeline import StepResult
from longtake.planning import PeakMemory, model_flops_utilization, peak_bf16_flops

Sizing = Literal["fixed", "halve", "search"]
Say = Callable[[str], None]

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What is timed of a configuration, and how."""

    protocol: Protocol = field(default_factory=Protocol)
    encoders: Encoders = "absent"
    sizing: Sizing = "fixed"
    """The micro-batch: as it is, halved until it fits, or searched."""
    micro_batch: int | None = None
    """None: the bucket's batch size, shared by the data-parallel processes; for a search, where it
    begins."""
    bucket: int = 0


def describe_step(encoders: Encoders) -> str:
    """What a timed step contains, in a sentence."""
    inputs = {
        "absent": "latents and text embeddings (or labels) are random and on the device already",
        "on-line": (
            "pixels (random bytes, decoded already) are copied from pinned memory and encoded, "
            "captions tokenized and encoded, by encoders with the real classes: those of the next "
            "step while this one is computed, unless a row says otherwise"
        ),
        "cached": (
            "latent statistics and text embeddings in bf16, as a store holds them, are copied from "
            "pinned memory, drawn from and scaled"
        ),
    }[encoders]
    return (
        f"timestep and noise drawn, forward, backward, clipping, AdamW, EMA; {inputs}; captions of "
        "full length; weights change; data loading is not part of it"
    )


def measure_step(
    config: RunConfig, mesh: Mesh, options: StepOptions, say: Say = lambda text: None
) -> Measurement:
    """Time the step of a configuration.

    Raises: DoesNotFit if the device's memory cannot hold it; FloatingPointError if its loss is not
    finite.
    """
    buckets = config.data.buckets
    if not 0 <= options.bucket < len(buckets):
        raise ValueError(f"bucket={options.bucket}: the configuration has {len(buckets)} buckets")
    if mesh.world_size > 1 and options.sizing != "fixed":
        raise ValueError(
            "searching a micro-batch needs one process: give --micro-batch a number under torchrun"
        )
    with kernels_as(config.kernels):
        return _Bench(config, mesh, options, say).measure()


class _Bench:
    """One measurement under way; holds the subject so that it can be made anew."""

    def __init__(self, config: RunConfig, mesh: Mesh, options: StepOptions, say: Say) -> None:
        self.config, self.mesh, self.options, self.say = config, mesh, options, say
        self.bucket = config.data.buckets[options.bucket]
        self.latents = latent_shape(config, self.bucket)
        self._subject: Subject | None = None

    def measure(self) -> Measurement:
        protocol = self.options.protocol
        if self.mesh.device.type == "cuda":
            # As training does: what is wrong on this device is not timed.
            for reason in verify_kernels(self.config, [self.latents[1:]], self.mesh.device):
                self.say(f"not used, its check failed: {reason}")
        micro_batch, trials = self._size()
        predicted = self._predicted(micro_batch)
        if predicted is not None:
            self.say(str(predicted))
        self.say(f"timing micro-batch {micro_batch}")
        timed = self._attempt(micro_batch, protocol, with_parts=True)
        if timed is None:
            raise DoesNotFit(f"out of memory at micro-batch {micro_batch}")
        return self._describe(micro_batch, timed, trials, predicted)

    def _size(self) -> tuple[int, list[Trial]]:
        """The micro-batch to be timed, and what the search for it tried."""
        given = self.options.micro_batch or max(1, self.bucket.batch_size // self.mesh.dp_size)
        if self.options.sizing == "fixed":
            return given, []
        if self.options.sizing == "halve":
            trials: list[Trial] = []
            while True:
                trials.append(self._try(given))
                if trials[-1].samples_per_second is not None:
                    return given, trials
                if given == 1:
                    raise DoesNotFit("out of memory at micro-batch 1")
                given //= 2
        start = self.options.micro_batch or 1
        if self.options.micro_batch is None and self.mesh.device.type == "cuda":
            tokens = work_of_latents(self.config, self.latents[1:], samples=1)["tokens"]
            start = first_micro_batch(tokens)
        return best_micro_batch(self._try, start=start, may_fit=self._may_fit)

    def _try(self, micro_batch: int) -> Trial:
        timed = self._attempt(micro_batch, quick(self.options.protocol))
        if timed is None:
            self.say(f"micro-batch {micro_batch}: out of memory")
            return Trial(micro_batch=micro_batch, samples_per_second=None)
        rate = 1000 * micro_batch / timed.timing.median_ms
        peak = "" if timed.allocated_gib is None else f", {timed.allocated_gib:.1f} GiB"
        self.say(
            f"micro-batch {micro_batch}: {rate:.4g} samples/s{peak}; first step "
            f"{timed.timing.first_step_seconds:.1f} s"
        )
        return Trial(micro_batch=micro_batch, samples_per_second=rate, peak_gib=timed.allocated_gib)

    def _may_fit(self, micro_batch: int, trials: list[Trial]) -> bool:
        # Before a trial has fitted there is nothing to go by, and not even the model may fit.
        is_known = any(trial.peak_gib is not None for trial in trials)
        if self.mesh.device.type != "cuda" or not is_known:
            return True
        free, _ = torch.cuda.mem_get_info(self.mesh.device)
        limit_gib = (free + torch.cuda.memory_reserved(self.mesh.device)) / _GIB
        fits = memory_allows(micro_batch, trials, fixed_gib=self._fixed_gib(), limit_gib=limit_gib)
        if not fits:
            self.say(f"micro-batch {micro_batch}: would not fit into {limit_gib:.0f} GiB")
        return fits

    def _fixed_gib(self) -> float:
        """What lies on the device whatever the micro-batch: weights, gradients, moments, EMA,
        encoders."""
        subject = self._get_subject()
        gradients = sum(param.numel() * 4 for param in subject.model.parameters())
        gradients //= self.mesh.num_shards
        return (torch.cuda.memory_allocated(self.mesh.device) + gradients) / _GIB

    def _predicted(self, micro_batch: int) -> PeakMemory | None:
        # Of a model that takes no memory: the real one may not fit.
        with torch.device("meta"):
            model = build_model_from_config(self.config.model)
        return predicted_peak(self.config, self.mesh, model, self.latents, micro_batch=micro_batch)

    def _get_subject(self) -> Subject:
        if self._subject is None:
            self._subject = Subject(
                self.config,
                self.mesh,
                encoders=self.options.encoders,
                seed=self.options.protocol.seed,
            )
        return self._subject

    def _attempt(
        self, micro_batch: int, protocol: Protocol, *, with_parts: bool = False
    ) -> _Timed | None:
        """Steps of this micro-batch, timed; None if memory does not hold them.

        After that happened the model is made anew: a step that broke off leaves gathered weights
        and graphs behind.
        """
        timed = None
        try:
            free_memory(self.mesh.device)
            subject = self._get_subject()
            timed = _time(
                subject,
                subject.workload(self.options.bucket, micro_batch),
                protocol,
                self.say,
                with_parts=with_parts,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The device's, or pinned memory of the host: it says which, and what was asked for.
            self.say(str(error).partition("\n")[0][:300])
        # Only now: the error's frames held what the step had allocated.
        if timed is None:
            subject = self._subject = None
            if is_compiled(self.config.parallel, self.mesh.device):
                torch.compiler.reset()  # compiled code may hold on to the model
            free_memory(self.mesh.device)
        return timed

    def _describe(
        self,
        micro_batch: int,
        timed: _Timed,
        trials: list[Trial],
        predicted: PeakMemory | None,
    ) -> Measurement:
        config, mesh = self.config, self.mesh
        subject = self._get_subject()
        work = work_of_latents(config, self.latents[1:], samples=1)
        # Per device: the processes of a token group share a micro-batch.
        rate = 1000 * micro_batch / mesh.sp / timed.timing.median_ms
        dtype = compute_dtype(config.parallel, mesh.device)
        peak = None
        if mesh.device.type == "cuda" and dtype is torch.bfloat16:
            peak = peak_bf16_flops(torch.cuda.get_device_name(mesh.device))
        patch = config.model.patch_size[1:]
        return Measurement(
            model=f"{config.model.name}-{config.model.size}/{patch[0]}",
            setting=str(self.bucket),
            encoders=self.options.encoders,
            num_devices=mesh.world_size,
            sp=mesh.sp,
            micro_batch=micro_batch,
            latents=self.latents,
            tokens_per_sample=work["tokens"],
            parameters=sum(param.numel() for param in subject.model.parameters()),
            timing=timed.timing,
            samples_per_second=rate,
            tokens_per_second=rate * work["tokens"],
            model_tflops=rate * work["flops"] / 1e12,
            mfu=model_flops_utilization(
                flops_per_sample=work["flops"],
                samples_per_second=rate,
                num_gpus=1,
                peak_flops=peak,
            ),
            peak_allocated_gib=timed.allocated_gib,
            peak_reserved_gib=timed.reserved_gib,
            predicted_peak_gib=None if predicted is None else predicted.total / _GIB,
            precision={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
            compiled=is_compiled(config.parallel, mesh.device),
            checkpointing=checkpointing_name(config.parallel),
            kernels=kernels_by_layer(config, self.latents[1:], mesh.device),
            encode_ahead=subject.encodes_ahead,
            parts_ms=timed.parts_ms,
            first_loss=timed.first_loss,
            last_loss=timed.last_loss,
            clocks=timed.clocks,
            trials=tuple(trials),
        )


@dataclass(frozen=True)
class _Timed:
    timing: Timing
    clocks: str | None
    allocated_gib: float | None
    reserved_gib: float | None
    first_loss: float
    last_loss: float
    parts_ms: dict[str, float]


def _time(
    subject: Subject, workload: Workload, protocol: Protocol, say: Say, *, with_parts: bool
) -> _Timed:
    device = subject.mesh.device
    # Of the model itself it may be what was gathered of it.
    watched = list(subject.trainee.ema.pairs())[-1].param
    before = local_part(watched).clone()
    results: list[StepResult] = []

    def step() -> None:
        results.append(subject.step(workload))

    times, clocks = time_steps(step, device, protocol, say)
    allocated = reserved = None
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device) / _GIB
        reserved = torch.cuda.max_memory_reserved(device) / _GIB
    losses = [float(result.loss) for result in results]
    if not all(math.isfinite(loss) for loss in losses):
        raise FloatingPointError(f"the loss is not finite: {losses}")
    assert all(bool(result.applied) for result in results), "an update was skipped"
    assert not torch.equal(before, local_part(watched)), "the weights did not change"
    parts = subject.parts(workload) if with_parts else {}
    parts_ms = {
        name: time_steps(part, device, protocol)[0].median_ms for name, part in parts.items()
    }
    return _Timed(times, clocks, allocated, reserved, losses[0], losses[-1], parts_ms)


def checkpointing_name(config: ParallelConfig) -> str:
    """The policy as reports show it."""
    name = config.checkpointing + (f" ({config.pieces})" if config.pieces != "all" else "")
    name += ", offloaded" if config.offload else ""
    name += f" but {config.kept_inputs} inputs" if config.kept_inputs else ""
    return name + (f", {config.kept_blocks} blocks kept" if config.kept_blocks else "")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it is the device's memory that ran out, whichever library noticed."""
    if error is None:
        return False
    words = ("out of memory", "ALLOC_FAILED", "OUT_OF_MEMORY", "Failed to CUDA calloc")
    return (
        isinstance(error, torch.OutOfMemoryError)
        or any(word in str(error) for word in words)
        or is_out_of_memory(error.__cause__)
    )


def free_memory(device: torch.device) -> None:
    """Gives back device memory that nothing uses, so that the next peak is its own."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def as_plain(config: RunConfig) -> RunConfig:
    """The same run on plain torch: explicit softmax, unfused norms, eager; same precision."""
    return replace(
        config,
        kernels=PLAIN,
        parallel=replace(
            config.parallel,
            compile=False,
            checkpointing="none",
            offload=False,
            kept_inputs=0,
            kept_blocks=0,
            pieces="all",
        ),
    )
