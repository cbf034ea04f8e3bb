"""Plan: arithmetic about a run, or its data, before anything is run.

longtake plan disk --clips 1000000 --clip 16x256x256 [--caption-tokens 40] [--json FILE]
longtake plan layout --gpus 64 --preset NAME [overrides as in train]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longtake.benchmark.inputs import latent_shape
from longtake.benchmark.measure import checkpointing_name
from longtake.config import RunConfig, parse_run, peak_of_grid, ring_size, work_of_latents
from longtake.data import Bucket, Manifest, read_manifest
from longtake.encoders.hashed_words import split_words
from longtake.models import build_model_from_config
from longtake.ops.attended import KEPT_KEYS
from longtake.parallel import blocks_per_unit
from longtake.planning import (
    FORMS,
    DiskPlan,
    LatentForm,
    Layout,
    LayoutWork,
    Links,
    PeakMemory,
    alternatives,
    assumptions,
    attention_macs,
    best_layout,
    exchanges_again,
    forwards_again,
    latent_size,
    layouts,
    mean_tokens,
    size_text,
    text_of_shape,
    token_grid,
    training_flops,
)


def main(arguments: Sequence[str]) -> int:
    """`longtake plan`."""
    programs: dict[str, Callable[[list[str]], int]] = {"disk": _disk, "layout": _layout}
    rest = list(arguments)
    if not rest or rest[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if rest[0] not in programs:
        raise ValueError(f"plan {rest[0]} does not exist: use {', '.join(programs)}")
    return programs[rest[0]](rest[1:])


@dataclass(frozen=True, kw_only=True)
class DiskCommand:
    """The space that a data set's encodings take, in every form, and what a total hides. `longtake
    encode --dry-run` says it exactly, of one manifest and one configuration."""

    clips: int | None = None
    """How many clips; or give a manifest."""
    manifest: Path | None = None
    """Count its clips and captions, and estimate the captions' lengths from their words."""
    clip: str | None = None
    """Frames x height x width of a clip in pixels, such as 16x256x256."""
    downsample: str = "1x8x8"
    """Pixels per latent in time, height and width; of the SD-VAE if not given."""
    channels: int = 4
    """Of the latents."""
    latent: str | None = None
    """In place of these three: channels x frames x height x width of the latents."""
    form: LatentForm = "bf16"
    """fp32: one sample, as many do; bf16, 8bit: statistics, as `longtake encode` keeps them."""
    posterior: bool = True
    """Whether the autoencoder gives a log-variance beside the mean."""
    places: int = 1
    """Of each clip in its video."""
    flip: bool = False
    """Keep the mirrored side of every clip, too."""
    text_channels: int = 4096
    """Width of a text token; 0 if there is no text."""
    max_tokens: int = 120
    """Longer captions are cut."""
    caption_tokens: str | None = None
    """True length of the captions: a mean, or lengths with their shares, such as 20:0.6,80:0.4."""
    tokens_per_word: float = 1.3
    """To estimate a manifest's caption lengths; punctuation marks count as words."""
    padded: bool = False
    """Keep every caption at max_tokens, whatever its length."""
    replicas: int = 1
    json: Path | None = None
    """Write the figures there as well; - prints them instead of the table."""


def _disk(arguments: list[str]) -> int:
    command = tyro.cli(
        DiskCommand,
        prog="longtake plan disk",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if (command.clips is None) == (command.manifest is None):
        raise ValueError("give the number of --clips or a --manifest, one of the two")
    manifest = None if command.manifest is None else read_manifest(command.manifest)
    clips = command.clips or 0
    captions = clips
    if manifest is not None:
        clips, captions = _different(manifest)
    true_tokens = _true_tokens(command, manifest)
    padded = command.padded or true_tokens is None
    plan = DiskPlan(
        clips=clips,
        latent=_latent(command),
        form=command.form,
        with_posterior=command.posterior,
        variants=command.places * (2 if command.flip else 1),
        captions=captions,
        tokens=float(command.max_tokens) if padded else true_tokens or 0.0,
        max_tokens=command.max_tokens,
        text_channels=command.text_channels,
        replicas=command.replicas,
    )
    if command.json is not None:
        text = json.dumps(_report(plan, true_tokens), indent=1)
        if str(command.json) == "-":
            print(text)
            return 0
        command.json.write_text(text + "\n", encoding="utf-8")
    _show(plan, true_tokens, manifest is not None and command.caption_tokens is None)
    return 0


def _different(manifest: Manifest) -> tuple[int, int]:
    """Clips and captions that are not those of another row."""
    samples = (manifest[sample_id] for sample_id in range(len(manifest)))
    clips = {(sample.path, sample.start, sample.end) for sample in samples}
    return len(clips), len(set(manifest.texts["caption"]))


def _latent(command: DiskCommand) -> tuple[int, int, int, int]:
    if (command.latent is None) == (command.clip is None):
        raise ValueError("give --clip (pixels) or --latent, one of the two: --clip 16x256x256")
    if command.latent is not None:
        channels, frames, height, width = _sizes("--latent", command.latent, 4)
        return channels, frames, height, width
    num_frames, height, width = _sizes("--clip", command.clip or "", 3)
    time, rows, columns = _sizes("--downsample", command.downsample, 3)
    frames, height, width = latent_size(
        num_frames, height, width, downsample=(time, rows, columns), causal=time > 1
    )
    return command.channels, frames, height, width


def _sizes(name: str, text: str, count: int) -> list[int]:
    sizes = text.split("x")
    if len(sizes) != count or not all(re.fullmatch("[0-9]{1,9}", size) for size in sizes):
        example = {3: "16x256x256", 4: "4x16x32x32"}[count]
        raise ValueError(f"{name} {text}: expected {count} whole numbers, such as {example}")
    return [int(size) for size in sizes]


def _true_tokens(command: DiskCommand, manifest: Manifest | None) -> float | None:
    """The captions' mean length after the cut; None if nothing is known of it."""
    if command.caption_tokens is not None:
        return mean_tokens(_lengths(command.caption_tokens), command.max_tokens)
    if manifest is None:
        return None
    lengths: Counter[int] = Counter()
    for caption in set(manifest.texts["caption"]):
        lengths[math.ceil(len(split_words(caption)) * command.tokens_per_word) + 1] += 1
    return mean_tokens(lengths, command.max_tokens)


def _lengths(text: str) -> dict[int, float]:
    """A mean, as two lengths that have it, or lengths with their shares."""
    try:
        if ":" not in text:
            mean = float(text)
            low = math.floor(mean)
            return {low: low + 1 - mean, low + 1: mean - low}
        pairs = [part.split(":") for part in text.split(",")]
        return {int(length): float(share) for length, share in pairs}
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"--caption-tokens {text}: expected a mean, such as 40, or lengths with their shares, "
            "such as 20:0.6,80:0.4"
        ) from error


def _report(plan: DiskPlan, true_tokens: float | None) -> dict[str, Any]:
    return {
        "plan": _figures(plan),
        "true_tokens": true_tokens,
        "alternatives": [_figures(other) for other in alternatives(plan, true_tokens)],
        "assumptions": assumptions(plan, true_tokens),
    }


def _figures(plan: DiskPlan) -> dict[str, Any]:
    names = ("clip_bytes", "caption_bytes", "latent_total", "text_total", "total")
    return asdict(plan) | {name: getattr(plan, name) for name in names}


def _show(plan: DiskPlan, true_tokens: float | None, is_estimate: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    text = f"{plan.clips:,} clips as latents of {text_of_shape(plan.latent)}"
    if plan.variants > 1:
        text += f", each in {plan.variants} variants"
    if plan.text_channels:
        text += f"; {plan.captions:,} captions, tokens {plan.text_channels} wide"
    if plan.replicas > 1:
        text += f"; {plan.replicas} replicas"
    console.print(escape(text))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("latents")
    table.add_column("text")
    for heading in ("a clip", "a caption", "latents", "text", "in all"):
        table.add_column(heading, justify="right")
    for other in alternatives(plan, true_tokens):
        is_chosen = other == plan
        text = "none"
        if other.text_channels:
            is_padded = other.tokens == other.max_tokens
            text = "padded to" if is_padded else "about" if is_estimate else "mean of"
            text += f" {other.tokens:.0f} tokens"
        cells = [FORMS[other.form], text]
        totals = (other.latent_total, other.text_total, other.total)
        cells += map(size_text, (other.clip_bytes, other.caption_bytes, *totals))
        table.add_row(*map(escape, cells), style="bold" if is_chosen else None)
    console.print(table)
    console.print(
        f"[bold]{size_text(plan.total)}[/] ({plan.total / 2**40:,.1f} TiB): {FORMS[plan.form]}. "
        "What this takes for granted:"
    )
    for line in assumptions(plan, true_tokens):
        console.print(escape(f"- {line}"))


_LAYOUT = """\
Which grid of processes a run should use on so many GPUs, by formula: --preset NAME or --config
FILE, dotted overrides as in train; samples are those of the first bucket, and all buckets' batches
are shared out. Nothing is measured here: bandwidths and the rate are what you say.

  --gpus N               all of them
  --gpus-per-machine N   default 8
  --machine-gb-s X       what a GPU sends to others of its machine, GB/s a direction; default 200
  --network-gb-s X       what each GPU sends to other machines, all at once; default 40
  --latency-us X         of one round of a collective; default 5
  --tflops X             of the model a GPU computes without communication; default 450
  --memory-tb-s X        of a GPU's memory, for the optimizer; default 4
  --memory-gib X         of a GPU, for what PyTorch allocates without encoders; default 70
  --micro-batch N        samples at once of each group of processes that share tokens; default 1
  --all                  every layout, not the best ten
"""


def _layout(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="longtake plan layout", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, required="--help" not in arguments)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    for name, default in (("machine-gb-s", 200), ("network-gb-s", 40), ("latency-us", 5)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--tflops", type=float, default=450)
    parser.add_argument("--memory-tb-s", type=float, default=4)
    parser.add_argument("--memory-gib", type=float, default=70)
    parser.add_argument("--all", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    config = parse_run(rest, prog="longtake plan layout", description=_LAYOUT)
    positive = ("gpus", "gpus_per_machine", "micro_batch", "machine_gb_s", "network_gb_s", "tflops")
    positive += ("memory_tb_s",)
    for name in positive:
        if not getattr(chosen, name) > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(chosen, name):g} must be above 0")
    buckets = config.data.buckets
    links = Links(
        machine_bytes=chosen.machine_gb_s * 1e9,
        network_bytes=chosen.network_gb_s * 1e9,
        latency_seconds=chosen.latency_us * 1e-6,
        gpus_per_machine=chosen.gpus_per_machine,
    )

    def layouts_of(work: LayoutWork) -> list[Layout]:
        found = layouts(
            chosen.gpus,
            work,
            links=links,
            flops_per_second=chosen.tflops * 1e12,
            memory_rate=chosen.memory_tb_s * 1e12,
        )
        return [one for one in found if _shares_out(buckets, one)]

    work_of = partial(_layout_work, gpus=chosen.gpus, micro_batch=chosen.micro_batch)
    work = work_of(config)
    found = layouts_of(work)
    if not found:
        batches = ", ".join(str(bucket.batch_size) for bucket in buckets)
        raise ValueError(
            f"batches of {batches} do not divide into what {chosen.gpus} GPUs take at once, of "
            f"which at most {links.gpus_per_machine} share a sample, with --micro-batch "
            f"{chosen.micro_batch}: set --data.buckets.0.batch-size to a multiple of it"
        )
    memory_bytes = chosen.memory_gib * 2**30
    best = best_layout(found, memory_bytes=memory_bytes)
    print(
        f"{config.name}: {work.parameters / 1e6:,.0f}M parameters, {work.grid.total:,} tokens a "
        f"sample of {buckets[0]}, batches of {buckets[0].batch_size}, checkpointing "
        f"{checkpointing_name(config.parallel)}; {chosen.gpus} GPUs. Predicted by formula, "
        "milliseconds and GiB of one GPU in a micro-batch with its update:"
    )
    _show_layouts(found, best, memory_bytes, number=len(found) if chosen.all else 10)
    if best is None:
        lighter = _lighter(config, lambda other: layouts_of(work_of(other)), found, memory_bytes)
        raise ValueError(
            f"no layout fits into --memory-gib {chosen.memory_gib:g}: the least is "
            f"{_least_gib(found):.0f} GiB. Try {lighter}a smaller --micro-batch, or more GPUs"
        )
    print(
        f"\n--parallel.dp-replicate {best.dp_replicate} --parallel.dp-shard {best.dp_shard} "
        f"--parallel.sp {best.sp} --train.accumulation "
        f"{buckets[0].batch_size // best.samples_at_once}"
    )
    return 0


def _layout_work(config: RunConfig, *, gpus: int, micro_batch: int) -> LayoutWork:
    bucket, parallel = config.data.buckets[0], config.parallel
    latents = latent_shape(config, bucket)
    with torch.device("meta"):
        model = build_model_from_config(config.model)
    depth, hidden_size, _ = config.model.dimensions
    policy = parallel.checkpointing, parallel.pieces
    kept_share = parallel.kept_blocks / depth
    grid = token_grid(latents[1:], patch=config.model.patch_size)
    flops = work_of_latents(config, latents[1:], samples=1)["flops"]
    sizes = {"hidden_size": hidden_size, "depth": depth}
    attended = attention_macs(config.model.name, grid, least_keys=KEPT_KEYS, **sizes)
    attended_share = training_flops(attended) / flops

    def again(ring: int) -> float:
        share = attended_share if ring == 1 else 0  # a ring keeps nothing of what it found
        return forwards_again(*policy, kept_share=kept_share, attended_share=share)

    def peak(groups: int, shards: int, sp: int) -> PeakMemory:
        return peak_of_grid(
            config,
            model,
            latents,
            micro_batch=micro_batch,
            shards=shards,
            processes=gpus,
            sp=sp,
            accumulation=max(1, bucket.batch_size // (groups * micro_batch)),
        )

    return LayoutWork(
        model=config.model.name,
        parameters=sum(param.numel() for param in model.parameters()),
        hidden_size=hidden_size,
        depth=depth,
        grid=grid,
        flops_per_sample=flops,
        peak=peak,
        ring=partial(ring_size, config),
        micro_batch=micro_batch,
        forwards_again=again,
        exchanges_again=exchanges_again(config.model.name, *policy, kept_share=kept_share),
        zero=parallel.zero,
        blocks_per_unit=blocks_per_unit(parallel, depth, shards=gpus, processes=gpus),
    )


def _shares_out(buckets: Sequence[Bucket], layout: Layout) -> bool:
    """Whether every bucket's batch divides into micro-batches, as many as the first one's."""
    accumulation, rest = divmod(buckets[0].batch_size, layout.samples_at_once)
    groups = layout.dp_replicate * layout.dp_shard
    return rest == 0 and all(one.batch_size % (groups * accumulation) == 0 for one in buckets)


def _least_gib(found: Sequence[Layout]) -> float:
    return min(one.memory.total for one in found) / 2**30


def _lighter(
    config: RunConfig,
    layouts_of: Callable[[RunConfig], list[Layout]],
    found: Sequence[Layout],
    memory_bytes: float,
) -> str:
    """The first policy under which a layout fits, or else the one that takes least, as a part of
    the advice; nothing if none takes less than the run's own."""
    least, advice = _least_gib(found), ""
    for policy in _LIGHTER:
        parallel = replace(config.parallel, kept_blocks=0, kept_inputs=0, pieces="all", **policy)
        gib = _least_gib(layouts_of(replace(config, parallel=parallel)))
        if gib < 0.99 * least:
            least = gib
            options = " ".join(f"--parallel.{name} {value}" for name, value in policy.items())
            advice = f"{options} ({gib:.0f} GiB), "
        if least * 2**30 <= memory_bytes:
            break
    return advice


# From the fastest on.
_LIGHTER: tuple[dict[str, Any], ...] = (
    {"checkpointing": "full"},
    {"checkpointing": "nested"},
    {"checkpointing": "nested", "offload": True},
)


def _show_layouts(
    found: Sequence[Layout], best: Layout | None, memory_bytes: float, *, number: int
) -> None:
    """The layouts, those first whose GPUs train most; what does not fit into memory last."""
    headings = ("replicate", "shard", "sp", "memory", "compute", "weights, gradients", "replicas")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in (*headings, "exchanges", "update", "on top", "of compute"):
        table.add_column(heading, justify="right")
    table.add_column("")
    order = sorted(found, key=lambda one: (one.memory.total > memory_bytes, one.seconds_per_sample))
    for one in order[:number]:
        seconds = (one.compute_seconds, one.shard_seconds, one.replica_seconds)
        seconds += (one.exchange_seconds, one.update_seconds, one.exposed_seconds)
        cells = [str(one.dp_replicate), str(one.dp_shard), str(one.sp)]
        cells.append(f"{one.memory.total / 2**30:.1f}")
        cells += [f"{1000 * value:.1f}" for value in seconds]
        cells.append(f"{one.exposed_seconds / one.compute_seconds:.1%}")
        cells.append("does not fit" if one.memory.total > memory_bytes else "")
        table.add_row(*cells, style="bold" if one is best else None)
    Console(soft_wrap=True, highlight=False, width=150).print(table)
