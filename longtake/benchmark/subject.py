"""What is timed: a model on its way, made as `longtake train` makes it, and its next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import nn

from longtake.benchmark.inputs import latent_shape, random_batches, random_inputs
from longtake.benchmark.records import Encoders
from longtake.config import RunConfig, Work, check_parts, work_of_latents
from longtake.data import Bucket
from longtake.diffusion import build_objective
from longtake.encoders import build_text_encoder, build_video_encoder
from longtake.models import Model, build_model_from_config, init_weights
from longtake.parallel import Mesh, local_part, materialize, parallelize, write_full
from longtake.pipeline import Inputs, StepResult, Trainee, encode_batch, training_step
from longtake.randomness import named_seed
from longtake.training import Ema, build_optimizer

# What weights that training starts at zero are given instead.
_SMALL = 0.02


@dataclass(frozen=True)
class Workload:
    """Micro-batches of one shape, to be taken in turn."""

    bucket: Bucket
    latents: tuple[int, int, int, int]
    work: Work  # of one process's step
    micro_batch: int
    batches: list[Callable[[], Inputs]]


class Subject:
    """A model with optimizer, averages and, on-line, its encoders."""

    def __init__(self, config: RunConfig, mesh: Mesh, *, encoders: Encoders, seed: int) -> None:
        if encoders == "cached":
            raise ValueError("encoders=cached needs a store of latents, which is not there yet")
        self.config, self.mesh, self.encoders, self.seed = config, mesh, encoders, seed
        self._steps = count()
        self._encode = None
        objective = build_objective(config.diffusion)
        with torch.device("meta"):
            self.model: Model = build_model_from_config(config.model)
        if encoders == "on-line":
            video_encoder = build_video_encoder(config.video_encoder, mesh.device, config.seed)
            text_encoder = build_text_encoder(config.text_encoder, mesh.device, config.seed)
            check_parts(
                config,
                condition=self.model.condition,
                objective=objective,
                video_encoder=video_encoder,
                text_encoder=text_encoder,
            )
            self._encode = partial(
                encode_batch,
                video_encoder=video_encoder,
                text_encoder=text_encoder,
                seed=seed,
                device=mesh.device,
                with_sizes=config.model.micro_conditioning,
            )
        parallelize(self.model, mesh, config.parallel)
        materialize(self.model, mesh.device)
        init_weights(self.model, seed=config.seed, write=write_full)
        _fill_zeros(self.model, seed)
        optimizer = build_optimizer(self.model, config.optimizer)
        ema = Ema(self.model, config.ema)
        self.trainee = Trainee(model=self.model, objective=objective, optimizer=optimizer, ema=ema)

    def workload(self, number: int, micro_batch: int) -> Workload:
        """Micro-batches of this size of bucket `number`, in memory."""
        bucket = self.config.data.buckets[number]
        latents = latent_shape(self.config, bucket)
        options = {"micro_batch": micro_batch, "mesh": self.mesh, "seed": self.seed}
        if self._encode is None:
            inputs = random_inputs(self.config, self.model, bucket, latents, **options)
            batches = [lambda one=one: one for one in inputs]
        else:
            loaded = random_batches(self.config, bucket, number, **options)
            batches = [partial(self._encode, batch) for batch in loaded]
        return Workload(
            bucket=bucket,
            latents=latents,
            work=work_of_latents(self.config, latents[1:], samples=micro_batch),
            micro_batch=micro_batch,
            batches=batches,
        )

    def step(self, workload: Workload) -> StepResult:
        """One step as training makes it, at the peak learning rate: the weights change."""
        number, optimizer = next(self._steps), self.config.optimizer
        encode = workload.batches[number % len(workload.batches)]
        return training_step(
            self.trainee,
            (make() for make in [encode]),
            num_micro_batches=1,
            condition_dropout=self.config.train.condition_dropout,
            clip_norm=optimizer.clip_norm,
            lr=optimizer.lr,
            step=number,
        )


@torch.no_grad()
def _fill_zeros(model: nn.Module, seed: int) -> None:
    """Gives weights that are zero at first small random values.

    Gates and last projections start at zero, so in the first steps half of the backward would
    multiply zeros, which is faster than any later step.
    """
    for name, param in model.named_parameters():
        part = local_part(param)
        if part.numel() and not bool(part.any()):
            generator = torch.Generator(part.device)
            generator.manual_seed(named_seed(seed, f"benchmark/{name}"))
            part.normal_(std=_SMALL, generator=generator)
