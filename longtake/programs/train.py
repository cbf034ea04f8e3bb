"""Train: from configuration to trained model. `train` reads top to bottom and holds the only loop.

config → mesh → data → encoders → model on meta → parallelize → init or load → optimizer, EMA →
resume → loop: batch → encode → noise → predict → loss → backward → clip → step → EMA → log →
checkpoint → sample
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.logging import RichHandler
from torch import Tensor

from longtake.config import (
    RunConfig,
    changes,
    check_parts,
    dump_yaml,
    load_yaml,
    parse_train,
    to_plain,
)
from longtake.data import (
    Batch,
    Bucket,
    Loader,
    LoaderState,
    Manifest,
    build_loader,
    open_manifest,
    validation_batches,
)
from longtake.diffusion import Objective, build_objective
from longtake.encoders import TextEncoder, VideoEncoder, build_text_encoder, build_video_encoder
from longtake.models import Model, build_model_from_config, init_weights
from longtake.ops.attention import choose_backend
from longtake.parallel import (
    Mesh,
    build_mesh,
    compute_dtype,
    gather_json,
    is_compiled,
    materialize,
    mean_over_processes,
    parallelize,
    start_distributed,
    stop_distributed,
    sync_gradients,
    write_full,
)
from longtake.pipeline import (
    Inputs,
    Request,
    encode_batch,
    generate,
    training_loss,
    validation_loss,
    write_clips,
)
from longtake.planning import forward_macs, peak_bf16_flops, token_grid, training_flops
from longtake.report import write_report
from longtake.training import (
    STOPPED_EXIT_CODE,
    Checkpointer,
    Ema,
    MetricsLog,
    ProgressBar,
    RunFolder,
    SkippedUpdates,
    StopRequest,
    Throughput,
    ThroughputMeter,
    apply_update,
    build_optimizer,
    clip_gradients,
    environment,
    hold_run_folder,
    learning_rate,
)
from longtake.weights import load_public, read_state_dict


def main(arguments: Sequence[str]) -> int:
    """`longtake train`."""
    command = parse_train(arguments)
    if command.dry_run:
        print(dump_yaml(command.config), end="")
        return 0
    return train(command.config, fresh=command.fresh)


def train(config: RunConfig, *, fresh: bool = False) -> int:
    """Train or resume a run; returns the exit status, 75 if it was asked to stop and has saved."""
    with ExitStack() as at_exit:
        stop = StopRequest()
        device = start_distributed(timeout_seconds=config.parallel.timeout_seconds)
        at_exit.callback(stop_distributed)
        mesh = build_mesh(config.parallel, device)
        folder = _open_folder(config, mesh, at_exit, fresh=fresh)

        manifest = open_manifest(config.data)
        video_encoder = build_video_encoder(config.video_encoder, device, config.seed)
        text_encoder = build_text_encoder(config.text_encoder, device, config.seed)
        objective = build_objective(config.diffusion)
        with torch.device("meta"):
            model = build_model_from_config(config.model)
        check_parts(
            config,
            condition=model.condition,
            objective=objective,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
        )

        parallelize(model, mesh, config.parallel)
        materialize(model, device)
        init_weights(model, seed=config.seed, write=write_full)
        if config.train.init_from:
            load_public(model, read_state_dict(config.train.init_from), write=write_full)
        optimizer = build_optimizer(model, config.optimizer)
        ema = Ema(model, config.ema)

        record = _record(config, mesh, model, manifest, video_encoder, text_encoder)
        documents = {"config.yaml": dump_yaml(config), "run.json": json.dumps(record, indent=2)}
        checkpointer = Checkpointer(
            folder.checkpoints, config.checkpoint, mesh, documents=documents
        )
        at_exit.callback(checkpointer.close)
        resumed = checkpointer.resume(model, optimizer, ema) or {}
        skipped = SkippedUpdates(device, **resumed.get("skipped", {}))
        loader = build_loader(
            config.data,
            seed=config.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            micro_batches=config.train.accumulation,
            start=LoaderState.from_json(resumed["loader"]) if resumed else None,
            manifest=manifest,
            pin_memory=device.type == "cuda",
        )
        step = loader.state.step

        encode = partial(
            encode_batch,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
            seed=config.seed,
            device=device,
            with_sizes=config.model.micro_conditioning,
        )
        validate = _validator(config, mesh, model, objective, ema, encode)
        sample = _sampler(config, mesh, model, objective, ema, folder, video_encoder, text_encoder)
        work = [_work(config, video_encoder, bucket) for bucket in config.data.buckets]
        metrics = MetricsLog(
            folder.path,
            config.metrics,
            is_writer=mesh.is_first,
            first_step=step,
            run_config=to_plain(config),
        )
        at_exit.callback(metrics.close)
        if mesh.is_first:
            folder.write_config(dump_yaml(config))
            folder.write_record(record | {"steps_done": step})
        note_bad_samples = _bad_sample_log(folder, mesh, loader)
        bar = ProgressBar(config.train.steps, done=step, is_shown=mesh.is_first)
        at_exit.enter_context(bar.shown())
        if step == 0:
            metrics.log(step, validate())

        meter = _meter(config, mesh)
        losses: list[Tensor] = []
        for micro_batches in islice(loader, config.train.steps - step):
            for batch in micro_batches:
                sync_gradients(model, is_last=batch is micro_batches[-1])
                inputs = encode(batch)
                loss = training_loss(
                    model, objective, inputs, condition_dropout=config.train.condition_dropout
                ).mean()
                (loss / len(micro_batches)).backward()
                losses.append(loss.detach())
            gradient_norm = clip_gradients(model, config.optimizer.clip_norm)
            lr = learning_rate(
                step, config.schedule, peak=config.optimizer.lr, total_steps=config.train.steps
            )
            applied = apply_update(optimizer, gradient_norm, lr=lr)
            ema.update(step, applied)
            skipped.add(applied)

            step = loader.state.step
            is_last = stop.agreed() or step == config.train.steps
            meter.add(**work[micro_batches[0].bucket])
            bar.advance()
            if is_last or step % config.train.log_every_steps == 0:
                speed = meter.report(step)
                line = metrics.log(
                    step,
                    {
                        "train/loss": mean_over_processes(torch.stack(losses).mean()),
                        "train/gradient_norm": gradient_norm,
                        "train/lr": lr,
                        "train/updates_skipped": skipped.total,
                        "data/samples_unreadable": note_bad_samples(step),
                        **_speed_metrics(speed, device),
                    },
                )
                losses.clear()
                bar.report(step, speed, line)
                skipped.check(config.optimizer.max_skipped_in_a_row)
            if is_last or step % config.validation.every_steps == 0:
                with meter.paused():
                    metrics.log(step, validate())
            if is_last or step % config.checkpoint.every_steps == 0:
                state = {"loader": loader.state.to_json(), "skipped": skipped.state_dict()}
                with meter.paused():
                    checkpointer.save(step, model, optimizer, ema, state)
            if is_last or (config.sampling.every_steps and step % config.sampling.every_steps == 0):
                with meter.paused():
                    sample(step)
            if is_last:
                break

        checkpointer.wait()
        metrics.flush()
        if mesh.is_first:
            folder.write_record(record | {"steps_done": step})
            bar.say(f"report: {write_report(folder.path)}")
        return 0 if step >= config.train.steps else STOPPED_EXIT_CODE


def _open_folder(config: RunConfig, mesh: Mesh, at_exit: ExitStack, *, fresh: bool) -> RunFolder:
    """The run's folder, held for this run; an existing run there must be the same one."""
    folder = RunFolder(Path(config.output) / config.name)
    level = logging.INFO if mesh.is_first else logging.WARNING
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        datefmt="[%X]",
        handlers=[RichHandler(show_path=False)],
    )
    logging.getLogger("longtake").setLevel(level)
    if fresh and mesh.is_first:
        folder.set_aside()
    at_exit.enter_context(hold_run_folder(folder.path))
    if folder.config.exists() and folder.has_checkpoints():
        for change in changes(load_yaml(folder.config, RunConfig), config):
            logging.getLogger("longtake").info("resuming with %s", change)
    return folder


def _record(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    manifest: Manifest,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
) -> dict[str, Any]:
    """`run.json`: what really runs, on what, with what."""
    size = {
        "name": f"{config.model.name}-{config.model.size}",
        "parameters": sum(param.numel() for param in model.parameters()),
    }
    return {
        "name": config.name,
        "environment": environment(),
        "model": size,
        "encoders": {
            "random": config.uses_random_encoders,
            "video": video_encoder.provenance,
            "text": text_encoder.provenance if text_encoder else None,
        },
        "data": {
            "manifest": str(manifest.file),
            "sha256": hashlib.sha256(manifest.file.read_bytes()).hexdigest(),
            "samples": len(manifest),
        },
        "parallel": {
            "processes": mesh.world_size,
            "dp_replicate": mesh.dp_replicate,
            "dp_shard": mesh.dp_shard,
            "sp": mesh.sp,
        },
        "compute": {
            "dtype": str(compute_dtype(config.parallel, mesh.device)).removeprefix("torch."),
            "compiled_blocks": is_compiled(config.parallel, mesh.device),
            "activation_checkpointing": config.parallel.checkpointing,
            "attention": _attention_backends(config, mesh),
        },
    }


def _attention_backends(config: RunConfig, mesh: Mesh) -> dict[str, str]:
    """Which backend each kind of attention takes."""
    _, hidden_size, num_heads = config.model.dimensions
    dtype = compute_dtype(config.parallel, mesh.device)
    q_BNAE = torch.empty(1, 1, num_heads, hidden_size // num_heads, dtype=dtype, device=mesh.device)
    return {
        "self": choose_backend(q_BNAE, q_BNAE, masked=False),
        "text": choose_backend(q_BNAE, q_BNAE, masked=True),
    }


class _Work(TypedDict):
    """What one step of a bucket amounts to, all processes together."""

    samples: int
    tokens: int
    flops: float


def _work(config: RunConfig, video_encoder: VideoEncoder, bucket: Bucket) -> _Work:
    _, frames, height, width = video_encoder.latent_shape(
        bucket.num_frames, bucket.height, bucket.width
    )
    grid = token_grid((frames, height, width), patch=config.model.patch_size)
    depth, hidden_size, _ = config.model.dimensions
    macs = forward_macs(
        config.model.name,
        grid,
        hidden_size=hidden_size,
        depth=depth,
        text_tokens=config.model.max_caption_tokens,
        mlp_ratio=config.model.mlp_ratio,
    )
    return {
        "samples": bucket.batch_size,
        "tokens": bucket.batch_size * grid.total,
        "flops": bucket.batch_size * training_flops(macs),
    }


def _meter(config: RunConfig, mesh: Mesh) -> ThroughputMeter:
    peak = None
    if mesh.device.type == "cuda" and compute_dtype(config.parallel, mesh.device) is torch.bfloat16:
        peak = peak_bf16_flops(torch.cuda.get_device_name(mesh.device))
    return ThroughputMeter(
        total_steps=config.train.steps,
        num_devices=mesh.world_size,
        peak_flops_per_second=peak,
    )


def _speed_metrics(speed: Throughput, device: torch.device) -> dict[str, float]:
    values = {
        "speed/step_seconds": speed.step_seconds,
        "speed/samples_per_second": speed.samples_per_second,
        "speed/tokens_per_second": speed.tokens_per_second,
        "speed/tokens_per_second_per_device": speed.tokens_per_second_per_device,
    }
    if speed.mfu is not None:
        values["speed/mfu"] = speed.mfu
    if device.type == "cuda":
        values["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return values


def _bad_sample_log(folder: RunFolder, mesh: Mesh, loader: Loader) -> Callable[[int], int]:
    """A function that writes down samples found unreadable since its last call, of all processes,
    and returns how many there were in all."""
    noted = 0

    def note(step: int) -> int:
        nonlocal noted
        bad, first_new = loader.bad, noted
        news = gather_json([asdict(sample) for sample in bad[first_new:]])
        total = sum(gather_json(len(bad)))
        noted = len(bad)
        if mesh.is_first:
            for sample in bad[first_new:]:
                logging.getLogger("longtake").warning("unreadable, replaced: %s", sample)
            folder.note_bad_samples(step, [sample for new in news for sample in new])
        return total

    return note


def _validator(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    objective: Objective,
    ema: Ema,
    encode: Callable[[Batch], Inputs],
) -> Callable[[], dict[str, Tensor]]:
    """A function that measures the averaged weights on the held-out samples, as metrics."""
    if config.validation.manifest is None:
        return dict
    batches = validation_batches(
        config.data,
        config.validation.manifest,
        batch_size=config.validation.batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        max_samples=config.validation.max_samples,
    )
    # Encoded once: the same latents at every validation, and no decoding in between.
    held_out = [encode(batch) for batch in batches]
    count = config.validation.num_timesteps
    units = objective.network_t(objective.grid_t(count, "cpu")).tolist()

    def validate() -> dict[str, Tensor]:
        with ema.swapped_in():
            sums = validation_loss(model, objective, held_out, num_timesteps=count)
        loss, weight = mean_over_processes(sums).unbind(dim=1)
        per_t = loss / weight
        named = {f"validation/loss_t{t:.0f}": per_t[i] for i, t in enumerate(units)}
        return {"validation/loss": per_t.mean(), **named}

    return validate


def _sampler(
    config: RunConfig,
    mesh: Mesh,
    model: Model,
    objective: Objective,
    ema: Ema,
    folder: RunFolder,
    video_encoder: VideoEncoder,
    text_encoder: TextEncoder | None,
) -> Callable[[int], None]:
    """A function that writes the configured samples of the averaged weights."""
    settings, bucket = config.sampling, config.data.buckets[0]
    request = Request(
        prompts=settings.prompts if text_encoder is not None else (),
        labels=settings.labels if text_encoder is None else (),
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        seed=settings.seed,
    )

    def sample(step: int) -> None:
        if not len(request):
            return
        with ema.swapped_in():
            videos = generate(
                model,
                objective,
                request,
                settings.sampler,
                video_encoder=video_encoder,
                text_encoder=text_encoder,
                device=mesh.device,
                with_sizes=config.model.micro_conditioning,
            )
        if mesh.is_first:
            target = folder.samples / f"step-{step:08}"
            write_clips(target, videos, request.captions, fps=settings.frames_per_second)

    return sample
