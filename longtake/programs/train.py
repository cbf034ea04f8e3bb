"""Train: from configuration to trained model. `train` reads top to bottom and holds the only loop.

config → mesh → data → encoders or latent store → model on meta → parallelize → init or load →
optimizer, EMA → resume → loop: batch → encode → noise → predict → loss → backward → clip → step →
EMA → log → validate → checkpoint → sample
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.config import (
    RunConfig,
    changes,
    check_conditions,
    check_parts,
    dump_yaml,
    largest_peak,
    latents_of_bucket,
    load_yaml,
    parse_train,
    run_record,
    throughput_meter,
    to_plain,
    token_notes,
    verify_kernels,
    work_of_step,
)
from longtake.data import (
    BadSample,
    LoaderState,
    Source,
    ValidationBatches,
    build_loader,
    validation_batches,
)
from longtake.diffusion import Objective, build_objective
from longtake.encoders import TextEncoder, VideoEncoder
from longtake.models import Model, build_model_from_config, init_weights
from longtake.ops.kernels import use_kernels
from longtake.parallel import (
    Mesh,
    build_mesh,
    materialize,
    may_be_restarted,
    mean_over_processes,
    parallelize,
    start_distributed,
    stop_distributed,
    write_full,
)
from longtake.pipeline import (
    Inputs,
    Request,
    Trainee,
    encode_batch,
    encoded_steps,
    encoders_of_source,
    generate,
    release,
    share_encoding,
    text_config_of_source,
    text_placement,
    to_uint8,
    training_step,
    validation_loss,
    write_clips,
)
from longtake.report import write_report
from longtake.store import (
    StoreSource,
    check_encoders,
    open_source,
)
from longtake.training import (
    STOPPED_EXIT_CODE,
    BadSampleLog,
    Checkpointer,
    Ema,
    MeanLoss,
    MetricsLog,
    ProgressBar,
    RunFolder,
    SkippedUpdates,
    StopRequest,
    Watchdog,
    build_optimizer,
    hold_run_folder,
    learning_rate,
    show_log,
    speed_metrics,
)
from longtake.weights import load_public, read_state_dict

log = logging.getLogger(__name__)


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
        # Entered first, left last: whatever the end of a run waits for is watched as well.
        watchdog = at_exit.enter_context(Watchdog(config.parallel.timeout_seconds))
        at_exit.callback(stop_distributed)
        mesh = build_mesh(config.parallel, device)
        show_log(is_first=mesh.is_first)
        use_kernels(config.kernels)
        folder = _open_folder(config, mesh, at_exit, fresh=fresh)

        source = open_source(config.data, with_text=config.text_encoder.kind != "none")
        manifest = source.manifest
        loader = build_loader(
            config.data,
            seed=config.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            micro_batches=config.train.accumulation,
            source=source,
            pin_memory=device.type == "cuda",
        )
        objective = build_objective(config.diffusion)
        with torch.device("meta"):
            model = build_model_from_config(config.model)
        check_conditions(manifest, config, model.condition)
        held_out = _held_out(config, mesh, model)
        video_encoder, text_encoder = encoders_of_source(
            source,
            config.video_encoder,
            config.text_encoder,
            mesh,
            config.seed,
            is_sampled=bool(config.sampling.prompts or config.sampling.labels),
        )
        if held_out is not None and isinstance(held_out.source, StoreSource):
            check_encoders(held_out.source.recipe, video_encoder, text_encoder)
        check_parts(
            config,
            condition=model.condition,
            objective=objective,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
        )

        for note in token_notes(config, mesh, video_encoder):
            log.info(note)
        if (predicted := largest_peak(config, mesh, model, video_encoder)) is not None:
            log.info("%s", predicted)
        if device.type == "cuda":
            shapes = [latents_of_bucket(video_encoder, bucket) for bucket in config.data.buckets]
            for failure in verify_kernels(config, shapes, device):
                log.warning("a kernel failed its check on this device: %s", failure)
        parallelize(model, mesh, config.parallel)
        materialize(model, device)
        init_weights(model, seed=config.seed, write=write_full)
        if config.train.init_from:
            load_public(model, read_state_dict(config.train.init_from), write=write_full)
        optimizer = build_optimizer(model, config.optimizer)
        ema = Ema(model, config.ema)
        trainee = Trainee(model=model, objective=objective, optimizer=optimizer, ema=ema)

        record = run_record(config, mesh, model, manifest, video_encoder, text_encoder)
        record["encoders"] |= {
            "ahead": config.train.encode_ahead,
            "text_placement": text_placement(
                text_config_of_source(source, config.text_encoder), text_encoder, mesh
            ),
            "shared_by": mesh.sp,
        }
        documents = {"config.yaml": dump_yaml(config), "run.json": json.dumps(record, indent=2)}
        checkpointer = Checkpointer(
            folder.checkpoints, config.checkpoint, mesh, documents=documents
        )
        at_exit.callback(checkpointer.close)
        resumed = checkpointer.resume(model, optimizer, ema) or {}
        if resumed:
            loader.state = LoaderState.from_json(resumed["loader"])
        skipped = SkippedUpdates(device, **resumed.get("skipped", {}))
        mean_loss = MeanLoss(device, **resumed.get("mean_loss", {}))
        step = loader.state.step
        if step >= config.train.steps:
            log.info("nothing to do: step %d of train.steps=%d is done", step, config.train.steps)

        metrics = MetricsLog(
            folder.path,
            config.metrics,
            is_writer=mesh.is_first,
            first_step=step,
            run_config=to_plain(config),
        )
        at_exit.callback(metrics.close)
        bad_samples = BadSampleLog(folder.bad_samples, is_writer=mesh.is_first, first_step=step)
        if mesh.is_first:
            folder.write_config(dump_yaml(config))
            folder.write_record(record | {"steps_done": step})
        bar = ProgressBar(config.train.steps, done=step, is_shown=mesh.is_first)
        at_exit.enter_context(bar.shown())

        encode_alone = partial(
            encode_batch,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
            seed=config.seed,
            device=device,
            with_sizes=config.model.micro_conditioning,
        )
        encode = partial(encode_alone, shared=share_encoding(mesh))
        watchdog.watch(model)
        validate = _validator(config, model, objective, ema, held_out, encode, metrics, bad_samples)
        sample = _sampler(config, mesh, model, objective, ema, folder, video_encoder, text_encoder)
        work = [work_of_step(config, video_encoder, bucket) for bucket in config.data.buckets]
        if step == 0:
            if mesh.is_first:
                _show_real_clips(config, source, encode_alone, video_encoder, folder)
            validate(step)
        release(video_encoder, text_encoder)

        meter = throughput_meter(config, mesh)
        steps_left = max(0, config.train.steps - step)
        for encoded in encoded_steps(
            loader, encode, num_steps=steps_left, device=device, ahead=config.train.encode_ahead
        ):
            lr = learning_rate(
                step, config.schedule, peak=config.optimizer.lr, total_steps=config.train.steps
            )
            result = training_step(
                trainee,
                encoded.micro_batches,
                num_micro_batches=encoded.num_micro_batches,
                condition_dropout=config.train.condition_dropout,
                clip_norm=config.optimizer.clip_norm,
                lr=lr,
                step=step,
            )
            mean_loss.add(result.loss)
            skipped.add(result.applied)

            step = encoded.place.step
            watchdog.progressed(f"the end of step {step}")
            meter.add(**work[encoded.bucket])
            bar.advance()
            is_last = step == config.train.steps
            if is_last or step % config.train.log_every_steps == 0:
                speed = meter.report(step)
                line = metrics.log(
                    step,
                    {
                        "train/loss": mean_loss.report(),
                        "train/gradient_norm": result.gradient_norm,
                        "train/lr": lr,
                        "train/updates_skipped": skipped.total,
                        "data/samples_unreadable": bad_samples.note(
                            step, manifest.file, _plain(encoded.bad)
                        ),
                        **speed_metrics(speed, device),
                    },
                )
                bar.report(step, speed, line)
                skipped.check(config.optimizer.max_skipped_in_a_row)
            if is_last or step % config.validation.every_steps == 0:
                with meter.paused():
                    validate(step)
            is_stopping = stop.agreed()
            if is_last or is_stopping or step % config.checkpoint.every_steps == 0:
                bad_samples.note(step, manifest.file, _plain(encoded.bad))
                state = {
                    "loader": encoded.place.to_json(),
                    "skipped": skipped.state_dict(),
                    "mean_loss": mean_loss.state_dict(),
                }
                with meter.paused():
                    checkpointer.save(step, model, optimizer, ema, state)
            if is_stopping and not is_last:
                break
            if is_last or (config.sampling.every_steps and step % config.sampling.every_steps == 0):
                with meter.paused():
                    sample(step)

        checkpointer.wait()
        metrics.flush()
        if mesh.is_first:
            folder.write_record(record | {"steps_done": step})
        if step < config.train.steps:
            bar.say(f"stopped at step {step} and saved: the same command goes on from there")
            return STOPPED_EXIT_CODE
        if mesh.is_first:
            _report(folder, bar)
        return 0


def _open_folder(config: RunConfig, mesh: Mesh, at_exit: ExitStack, *, fresh: bool) -> RunFolder:
    """The run's folder, held for this run; an existing run there must be the same one."""
    folder = RunFolder(Path(config.output) / config.name)
    if fresh and may_be_restarted():
        raise ValueError(
            "--fresh does not go with torchrun --max-restarts: every restart would set the run "
            "aside and begin again. Move the old folder away, or choose another --name"
        )
    if fresh and folder.path.exists():
        with hold_run_folder(folder.path):  # not the folder of a run that is still going on
            if mesh.is_first:
                folder.set_aside()
    at_exit.enter_context(hold_run_folder(folder.path))
    if folder.config.exists() and folder.has_checkpoints():
        for change in changes(load_yaml(folder.config, RunConfig), config):
            log.info("resuming with %s", change)
    return folder


def _plain(samples: Sequence[BadSample]) -> list[dict[str, object]]:
    return [asdict(sample) for sample in samples]


def _held_out(config: RunConfig, mesh: Mesh, model: Model) -> ValidationBatches | None:
    """The held-out samples, if the run has any; decoded when iterated."""
    if config.validation.manifest is None:
        return None
    source = open_source(
        config.data, config.validation.manifest, with_text=config.text_encoder.kind != "none"
    )
    check_conditions(source.manifest, config, model.condition)
    return validation_batches(
        config.data,
        source,
        batch_size=config.validation.batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        max_samples=config.validation.max_samples,
    )


def _validator(
    config: RunConfig,
    model: Model,
    objective: Objective,
    ema: Ema,
    held_out: ValidationBatches | None,
    encode: Callable[[Any], Inputs],
    metrics: MetricsLog,
    bad_samples: BadSampleLog,
) -> Callable[[int], None]:
    """A function that measures the averaged weights on the held-out samples and logs it."""
    if held_out is None:
        return lambda step: None
    batches = list(held_out)
    bad_samples.note(
        0, held_out.manifest.file, _plain([sample for batch in batches for sample in batch.bad])
    )
    num_readable = mean_over_processes(torch.stack([batch.weights_B for batch in batches]).sum())
    if not num_readable:
        raise ValueError(
            f"none of the held-out samples of {held_out.manifest.file} can be read: "
            "see bad_samples.jsonl in the run's folder, or `longtake doctor --manifest`"
        )
    # Encoded once: the same latents at every validation, and no decoding in between.
    inputs = [encode(batch) for batch in batches]
    count = config.validation.num_timesteps
    units = objective.network_t(objective.grid_t(count, "cpu")).tolist()

    def validate(step: int) -> None:
        with ema.swapped_in():
            sums = validation_loss(model, objective, inputs, num_timesteps=count)
        loss, weight = mean_over_processes(sums).unbind(dim=1)
        per_t = loss / weight
        named: dict[str, Tensor] = {
            f"validation/loss_t{t:.0f}": per_t[i] for i, t in enumerate(units)
        }
        metrics.log(step, {"validation/loss": per_t.mean(), **named})

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
        prompts=settings.prompts,
        labels=settings.labels,
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
        release(video_encoder, text_encoder)
        if mesh.is_first:
            write_clips(
                folder.samples / f"step-{step:08}",
                videos,
                request.captions,
                fps=settings.frames_per_second,
                with_random_encoders=config.uses_random_encoders,
            )

    return sample


def _show_real_clips(
    config: RunConfig,
    source: Source,
    encode: Callable[[Any], Inputs],
    video_encoder: VideoEncoder,
    folder: RunFolder,
) -> None:
    """Writes a few of the training clips for the report, those with a sampled prompt first."""
    is_encoded = isinstance(source, StoreSource)
    if is_encoded and not (config.sampling.prompts or config.sampling.labels):
        return  # not worth loading a decoder for
    read = validation_batches(config.data, source, batch_size=8, max_samples=8)
    batch = next(iter(read))
    labels, readable = batch.labels_B.tolist(), batch.weights_B.bool().tolist()
    captions = [text or f"label {labels[k]}" for k, text in enumerate(batch.captions)]
    chosen = sorted(
        (k for k in range(len(captions)) if readable[k]),
        key=lambda k: captions[k] not in config.sampling.prompts,
    )[:4]
    if chosen:
        if is_encoded:
            pixels_BCTHW = to_uint8(video_encoder.decode(encode(batch).clean_BCTHW[chosen]))
        else:
            pixels_BCTHW = batch.pixels_BCTHW[chosen]
        write_clips(
            folder.path / "real",
            pixels_BCTHW,
            [captions[k] for k in chosen],
            fps=config.sampling.frames_per_second,
        )


def _report(folder: RunFolder, bar: ProgressBar) -> None:
    """The page of the finished run; a missing plotting package must not make the run a failure."""
    try:
        bar.say(f"report: {write_report(folder.path)}")
    except ImportError as error:
        log.warning("no report: %s", error)
