"""What is timed: a model on its way, made as `longtake train` makes it, and its next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice, repeat
from typing import Any

import torch
from torch import nn

from longtake.benchmark.inputs import (
    latent_shape,
    random_batches,
    random_encoded_batches,
    random_inputs,
    stored_video_encoder,
)
from longtake.benchmark.records import Encoders
from longtake.config import RunConfig, Work, check_parts, work_of_latents
from longtake.data import Bucket
from longtake.diffusion import build_objective
from longtake.models import Model, build_model_from_config, init_weights
from longtake.parallel import Mesh, local_part, materialize, parallelize, write_full
from longtake.pipeline import (
    Inputs,
    StepResult,
    Trainee,
    build_encoders,
    encode_batch,
    in_turn,
    share_encoding,
    training_step,
)
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
    batches: list[Any]
    """As the loader gives them, or `Inputs` where there is nothing to encode."""
    inputs: Iterator[Inputs]
    """Without end; encoded when they are asked for, or ahead."""


class Subject:
    """A model with optimizer, averages and, on-line, its encoders."""

    def __init__(self, config: RunConfig, mesh: Mesh, *, encoders: Encoders, seed: int) -> None:
        self.config, self.mesh, self.encoders, self.seed = config, mesh, encoders, seed
        self._steps = count()
        self._video_encoder = self._text_encoder = None
        self._shared = share_encoding(mesh)
        self.encodes_ahead = encoders != "absent" and config.train.encode_ahead
        objective = build_objective(config.diffusion)
        with torch.device("meta"):
            self.model: Model = build_model_from_config(config.model)
        if encoders == "on-line":
            self._video_encoder, self._text_encoder = build_encoders(
                config.video_encoder, config.text_encoder, mesh, config.seed
            )
            check_parts(
                config,
                condition=self.model.condition,
                objective=objective,
                video_encoder=self._video_encoder,
                text_encoder=self._text_encoder,
            )
        elif encoders == "cached":
            self._video_encoder = stored_video_encoder(config, mesh.device)
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
        if self.encoders == "absent":
            batches = random_inputs(self.config, self.model, bucket, latents, **options)
            inputs = cycle(batches)
        else:
            if self.encoders == "cached":
                given = (self.config, self.model, bucket, number, latents)
                batches = random_encoded_batches(*given, **options)
            else:
                batches = random_batches(self.config, bucket, number, **options)
            inputs = in_turn(
                self._encode, cycle(batches), device=self.mesh.device, ahead=self.encodes_ahead
            )
        return Workload(
            bucket=bucket,
            latents=latents,
            work=work_of_latents(self.config, latents[1:], samples=micro_batch),
            micro_batch=micro_batch,
            batches=batches,
            inputs=inputs,
        )

    def step(self, workload: Workload) -> StepResult:
        """One step as training makes it, at the peak learning rate: the weights change."""
        return self._train(workload.inputs)

    def parts(self, workload: Workload) -> dict[str, Callable[[], object]]:
        """What a step with encoders on-line consists of, each to be called alone; else nothing."""
        if self.encoders != "on-line":
            return {}
        batch, text_encoder = workload.batches[0], self._text_encoder
        inputs = repeat(self._encode(batch))
        found: dict[str, Callable[[], object]] = {
            "transformer": lambda: self._train(inputs),
            "video encoder": partial(self._encode, batch, with_text=False),
        }
        if text_encoder is not None:
            found["text encoder"] = partial(self._shared.text(text_encoder), batch.captions)
        return found

    def _encode(self, batch: Any, *, with_text: bool = True) -> Inputs:
        assert self._video_encoder is not None
        return encode_batch(
            batch,
            video_encoder=self._video_encoder,
            text_encoder=self._text_encoder if with_text else None,
            seed=self.seed,
            device=self.mesh.device,
            with_sizes=self.config.model.micro_conditioning,
            shared=self._shared,
        )

    def _train(self, inputs: Iterator[Inputs]) -> StepResult:
        optimizer = self.config.optimizer
        return training_step(
            self.trainee,
            islice(inputs, 1),
            num_micro_batches=1,
            condition_dropout=self.config.train.condition_dropout,
            clip_norm=optimizer.clip_norm,
            lr=optimizer.lr,
            step=next(self._steps),
        )


@torch.no_grad()
def _fill_zeros(model: nn.Module, seed: int) -> None:
    """Gives weights that are zero at first small random values.

    Gates and last projections start at zero, so in the first steps half of the backward would
    multiply zeros, which is faster than any later step. The same on every grid of processes.
    """
    for name, param in model.named_parameters():
        if not bool(local_part(param).any()):
            device = local_part(param).device
            generator = torch.Generator(device)
            generator.manual_seed(named_seed(seed, f"benchmark/{name}"))
            small = torch.empty(param.shape, device=device)
            write_full(param, small.normal_(std=_SMALL, generator=generator))
