"""Encode: a manifest's clips and captions into a latent store, which `train` reads in their stead.

config → encoders → verify → which files → what is missing, and what of it the disk has room for →
encode, shard by shard → index
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from longtake.config import RunConfig, parse_run
from longtake.data import Manifest, MediaError, describe_bad, open_manifest
from longtake.parallel import gather_json, start_distributed, stop_distributed
from longtake.planning import break_even_steps, parse_size, size_text
from longtake.store import (
    Budget,
    Catalog,
    Cluster,
    Content,
    Damage,
    Demand,
    Encoding,
    Form,
    Identity,
    Index,
    Job,
    Recipe,
    Tally,
    WorkList,
    agreed_rates,
    captions_to_time,
    content_of,
    demand_of,
    failed_samples,
    file_keys,
    find_damage,
    group_text,
    is_store,
    largest_size,
    make_index,
    manifest_facts,
    missing_work,
    read_catalog,
    remove_leftovers,
    remove_shards,
    set_aside,
    shards_folder,
    shares_kept,
    wait_for_claim,
    write_index,
)
from longtake.training import clock, show_log

log = logging.getLogger(__name__)

# Longer than the slowest disk takes to be read through before the processes compare notes.
_A_WEEK_SECONDS = 7 * 24 * 3600
_SECONDS_BETWEEN_LINES = 10.0

_DESCRIPTION = (
    "Encode a manifest's clips and captions once, into the latent store --output STORE; then train "
    "with --data.manifest STORE. Start from the preset or config that will train. On a store that "
    "is there, only what is new or changed is encoded. --latents 8bit takes half the space. "
    "--verify reads every byte first and encodes again what is damaged. --identity size-mtime "
    "knows files by name, size and time instead of reading them all (sha256). --disk-budget 2TB "
    "keeps what saves most encoding for its bytes and leaves the rest to training; larger or "
    "smaller at the next run, the store grows or shrinks to it. --shard-mib sets the shards' size, "
    "--retry-failed tries clips again that failed before. --dry-run only says what "
    "there is to do; with --verify it only verifies, and needs neither clips nor encoders. "
    "--engine ray encodes on all machines of a Ray cluster, of --ray-address or RAY_ADDRESS, or on "
    "this one, with --ray-workers at most."
)


@dataclass(frozen=True, kw_only=True)
class EncodeCommand:
    """A parsed `longtake encode` command line."""

    config: RunConfig
    store: Path
    latents: Form
    identity: Identity
    shard_mib: float
    disk_budget: int | None
    verify: bool
    retry_failed: bool
    dry_run: bool
    engine: Literal["local", "ray"]
    ray_address: str | None
    ray_workers: int


def main(arguments: Sequence[str]) -> int:
    """`longtake encode`."""
    return encode(parse_encode(arguments))


def parse_encode(arguments: Sequence[str]) -> EncodeCommand:
    """Resolve the command line."""
    base = argparse.ArgumentParser(prog="longtake encode", add_help=False, allow_abbrev=False)
    base.add_argument("--output")
    base.add_argument("--latents", choices=["bf16", "8bit"], default="bf16")
    base.add_argument("--identity", choices=["sha256", "size-mtime"], default="sha256")
    base.add_argument("--shard-mib", type=float, default=512.0)
    base.add_argument("--disk-budget")
    base.add_argument("--verify", action="store_true")
    base.add_argument("--retry-failed", action="store_true")
    base.add_argument("--dry-run", action="store_true")
    base.add_argument("--engine", choices=["local", "ray"], default="local")
    base.add_argument("--ray-address")
    base.add_argument("--ray-workers", type=int, default=0)
    chosen, rest = base.parse_known_args(list(arguments))
    config = parse_run(rest, prog="longtake encode", description=_DESCRIPTION)
    if not chosen.output:
        raise ValueError("--output is not set: give the folder of the latent store")
    if "://" in chosen.output:
        raise ValueError(
            f"--output {chosen.output}: a store is filled on a file system; copy it to object "
            "storage afterwards, where training can read it"
        )
    if not 0 < chosen.shard_mib <= 2**20:
        raise ValueError(f"--shard-mib {chosen.shard_mib} must be above 0: 512 is usual")
    if chosen.ray_workers < 0:
        raise ValueError(f"--ray-workers {chosen.ray_workers} must be 0 (all there is) or more")
    if chosen.engine == "local" and (chosen.ray_address or chosen.ray_workers):
        raise ValueError("--ray-address and --ray-workers have no effect without --engine ray")
    budget = chosen.disk_budget
    return EncodeCommand(
        config=config,
        store=Path(chosen.output),
        latents=chosen.latents,
        identity=chosen.identity,
        shard_mib=chosen.shard_mib,
        disk_budget=None if budget is None else parse_size(budget, name="--disk-budget"),
        verify=chosen.verify,
        retry_failed=chosen.retry_failed,
        dry_run=chosen.dry_run,
        engine=chosen.engine,
        ray_address=chosen.ray_address,
        ray_workers=chosen.ray_workers,
    )


def encode(command: EncodeCommand) -> int:
    """Fill the store; returns the exit status, 1 if damage was found and only looked for."""
    config, store = command.config, command.store
    if store.exists() and not is_store(store) and not (store.is_dir() and _is_empty(store)):
        raise ValueError(f"{store} exists and is not a latent store: choose another --output")
    with ExitStack() as at_exit:
        device = start_distributed(timeout_seconds=_A_WEEK_SECONDS)
        at_exit.callback(stop_distributed)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        show_log(is_first=rank == 0)
        console = Console(quiet=rank != 0, soft_wrap=True, highlight=False, markup=False)

        damages = _verify(command, rank, world_size) if command.verify else []
        for damage in damages:
            console.print(f"damaged: {damage}")
        if command.verify and not damages:
            console.print("every byte is as it was written")
        if command.verify and command.dry_run:
            return 1 if damages else 0

        manifest = open_manifest(config.data)
        engine, recipe = _start_engine(command, manifest, device, world_size, at_exit, console)
        if config.data.clip_position == "random" and not config.data.clip_places:
            log.info("clips are stored at one place, their beginning: see --data.clip-places")

        catalog = read_catalog(store)
        if catalog.damaged and not command.dry_run:
            for name, problem in catalog.damaged.items():
                log.warning("set aside: %s: %s", name, problem)
            set_aside(store, catalog.damaged)

        keys, failures = _file_keys(manifest, command.identity, rank, world_size)
        content = content_of(manifest, recipe, keys, failures)
        demand = demand_of(content, recipe, config.data)
        budget = None
        if command.disk_budget is not None:
            measure = partial(engine.measure, captions_to_time(manifest, content))
            rates = agreed_rates(store, recipe, measure, is_kept=not command.dry_run)
            budget = Budget(command.disk_budget, manifest, recipe, content, demand, rates)

        def missing(catalog: Catalog) -> list[WorkList]:
            """What is to be done: all that the store lacks, or as much as there is room for."""
            wanted = int(command.shard_mib * 2**20)
            work = missing_work(
                content,
                recipe,
                catalog,
                shard_bytes=wanted if budget is None else budget.shard_bytes(wanted),
                retry_failed=command.retry_failed,
                demand=demand,
            )
            return work if budget is None else budget.affordable(work, catalog)

        def update_index(catalog: Catalog) -> Index:
            with wait_for_claim(store, "index"):
                facts = manifest_facts(manifest.file) | {"identity": command.identity}
                if budget is not None:
                    facts["disk_budget"] = budget.size
                index = make_index(manifest, recipe, content, catalog, facts)
                write_index(store, index)
            return index

        if budget is not None:
            catalog = _make_room(
                console, store, budget, catalog, update_index if rank == 0 else None, command
            )
        work = missing(catalog)
        _print_work(console, work, content, recipe)
        if command.dry_run:
            return 0

        shards_folder(store).mkdir(parents=True, exist_ok=True)
        tally, started = Tally(), time.perf_counter()
        with _Progress(console, tally):
            # What turned out smaller than it might have been leaves room for more.
            while work:
                tally.total += sum(item.num_items for item in work)
                engine.encode(work, tally, share=rank, shares=world_size)
                work = [] if budget is None else missing(read_catalog(store))
        seconds = time.perf_counter() - started

        # All lists are done when a process comes here, whoever did them: one index is enough.
        if rank == 0:
            remove_leftovers(store)
            index = update_index(read_catalog(store))
            _print_summary(console, store, index)
            spent = seconds * engine.num_workers
            _print_break_even(console, index, content, demand, config, tally, spent, budget)
        return 0


def _start_engine(
    command: EncodeCommand,
    manifest: Manifest,
    device: torch.device,
    world_size: int,
    at_exit: ExitStack,
    console: Console,
) -> tuple[Encoding | Cluster, Recipe]:
    """What encodes, here or on a cluster, and the recipe by which it does."""
    config = command.config
    job = Job(
        store=command.store.absolute(),
        data=replace(config.data, manifest=str(manifest.file.absolute())),
        video=config.video_encoder,
        text=config.text_encoder,
        seed=config.seed,
        latents=command.latents,
    )
    if command.engine == "local":
        engine = Encoding(job, device, manifest)
        return engine, engine.recipe
    if world_size > 1:
        raise ValueError("--engine ray starts its processes itself: do not start it with torchrun")
    engine = Cluster(job, manifest, address=command.ray_address, workers=command.ray_workers)
    at_exit.callback(engine.close)
    console.print(engine.what)
    return engine, engine.recipe()


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _verify(command: EncodeCommand, rank: int, world_size: int) -> list[Damage]:
    """All processes' findings; the damaged shards are out of the way then."""
    store = command.store
    if not is_store(store):
        raise ValueError(f"--verify: {store} is not a latent store")
    found = find_damage(store, share=rank, shares=world_size)
    if not command.dry_run:
        set_aside(store, [d.file.removeprefix("shards/") for d in found if d.is_shard])
    everywhere = gather_json([asdict(damage) for damage in found])
    return [Damage(**damage) for part in everywhere for damage in part]


def _file_keys(
    manifest: Manifest, identity: Identity, rank: int, world_size: int
) -> tuple[np.ndarray, dict[int, MediaError]]:
    """Every sample's file key; the processes share the looking."""
    keys, failures = file_keys(manifest, identity, share=rank, shares=world_size)
    if world_size > 1:
        # Each file was looked at by one process, and the others left zeros.
        dist.all_reduce(torch.from_numpy(keys), op=dist.ReduceOp.MAX)
        own = {str(sample_id): (e.path, e.reason, e.text) for sample_id, e in failures.items()}
        failures = {
            int(sample_id): MediaError(*error)
            for part in gather_json(own)
            for sample_id, error in part.items()
        }
    return keys, failures


def _print_work(
    console: Console, work: Sequence[WorkList], content: Content, recipe: Recipe
) -> None:
    clips, captions = (
        sum(item.num_items for item in work if item.kind == kind) for kind in ("clips", "text")
    )
    text = f"to encode: {clips:,} clips and {captions:,} captions in {len(work):,} shards"
    if work:
        text += f", at most {size_text(sum(largest_size(item, recipe) for item in work))}"
    if content.failures:
        text += f"; {len(content.failures):,} samples have no readable file"
    console.print(text)


def _make_room(
    console: Console,
    store: Path,
    budget: Budget,
    catalog: Catalog,
    update_index: Callable[[Catalog], Index] | None,
    command: EncodeCommand,
) -> Catalog:
    """Removes what a budget has no room for; returns what is left."""
    if budget.size < budget.index_bytes:
        raise ValueError(
            f"--disk-budget {size_text(budget.size)} is less than the index of "
            f"{len(budget.manifest):,} samples may take, {size_text(budget.index_bytes)}: give more"
        )
    missing = missing_work(
        budget.content, budget.recipe, catalog, shard_bytes=2**62, retry_failed=command.retry_failed
    )
    names = budget.too_much(catalog, missing)
    kept = read_catalog(store, without=names) if names else catalog
    if not command.dry_run:
        if names and update_index is not None:
            # First the index: a store never names what it does not have.
            update_index(kept)
            remove_shards(store, names)
        dist.barrier()
    sizes = dict(zip(catalog.shards, catalog.shard_sizes, strict=True))
    before, budget_text = size_text(sum(sizes.values())), size_text(budget.size)
    text = f"disk budget {budget_text}: {before} in {len(sizes):,} shards"
    if names:
        verb = "would be removed" if command.dry_run else "removed, being worth least"
        text += (
            f", of which {len(names):,} with {size_text(sum(sizes[name] for name in names))} {verb}"
        )
    console.print(f"{text}; room for {size_text(budget.room(kept))} more beside the index")
    for group, rate in budget.rates.items():
        console.print(
            f"  {group_text(group, budget.recipe)}: {_seconds(rate.seconds)} of encoding and "
            f"{size_text(rate.num_bytes)} each, {_seconds(rate.seconds / rate.num_bytes * 1e6)} "
            "per MB"
        )
    return kept


def _print_break_even(
    console: Console,
    index: Index,
    content: Content,
    demand: Demand,
    config: RunConfig,
    tally: Tally,
    seconds: float,
    budget: Budget | None,
) -> None:
    """What the store saves a training step, and when encoding has paid for itself; `seconds` are
    those of all processes that `tally` knows of."""
    each = {group: spent / count for group, (count, spent) in tally.encoded.items()}
    if budget is not None:
        each = {group: rate.seconds for group, rate in budget.rates.items()} | each
    shares = shares_kept(index, content, demand)
    if any(share.group not in each for share in shares):
        return  # nothing of some kind was encoded in this run, so it has no rates
    if budget is not None:
        for share in shares:
            part = share.kept / share.needed if share.needed else 1.0
            console.print(
                f"  {group_text(share.group, index.recipe)}: {share.kept:,} of {share.needed:,} "
                f"kept ({part:.0%})"
            )
    saved = sum(share.kept_per_step * each[share.group] for share in shares)
    asked = sum(share.needed_per_step * each[share.group] for share in shares)
    encoded = sum(spent for _, spent in tally.encoded.values())
    if not encoded:
        return
    # Decoding, waiting and writing, on top of the encoders' own time.
    factor = max(1.0, seconds / encoded)
    ahead = factor * sum(share.kept * each[share.group] for share in shares)
    steps = break_even_steps(ahead_seconds=ahead, saved_per_step=saved)
    if math.isinf(steps):
        return
    buckets = config.data.buckets
    total = sum(bucket.weight for bucket in buckets)
    samples = sum(bucket.weight / total * bucket.batch_size for bucket in buckets)
    console.print(
        f"break-even: a training step asks for {_seconds(asked)} of encoding, all processes "
        f"together; the store saves {_seconds(saved)} of it ({saved / asked:.0%}). Encoding all it "
        f"holds takes {_seconds(ahead)} ({factor:.1f} times the encoders' own time) and wins after "
        f"{steps:,.0f} steps of {samples:,.0f} samples, "
        f"{steps * samples / len(index.manifest):,.1f} epochs, against a run that encodes within "
        "the step; later against one whose encoders work beside the transformer"
    )


def _seconds(value: float) -> str:
    for unit in ("s", "ms", "us"):
        if value >= 1 or unit == "us":
            return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
        value *= 1000
    raise AssertionError


def _print_summary(console: Console, store: Path, index: Index) -> None:
    facts = index.facts
    console.print(
        f"{store} holds {facts['clips']:,} clips and {facts['captions']:,} captions of "
        f"{facts['samples']:,} samples in {len(index.entries.shards):,} shards, "
        f"{size_text(facts['bytes'])}"
    )
    if error := facts.get("error_of_8bit"):
        share = error["rms_error"] / error["latents_std"]
        text = (
            f"8 bits against bf16: root-mean-square error {error['rms_error']:.2g} where the "
            f"latents' standard deviation is {error['latents_std']:.3g} ({share:.2%}), "
            f"largest {error['largest_error']:.2g}"
        )
        if relative := error.get("posterior_std_relative_error"):
            text += f"; posterior standard deviations off by {relative:.2%}"
        console.print(text)
    if failed := failed_samples(index):
        console.print(f"{len(failed):,} samples could not be encoded and will be replaced:")
        console.print(describe_bad(failed))


class _Progress:
    """A line that says how far all processes are, how fast, and what failed."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self.console, self.tally = console, tally
        self.started = self.shown = time.monotonic()
        self.status = console.status("") if console.is_terminal and not console.quiet else None

    def __enter__(self) -> None:
        if self.status:
            self.status.start()
        self.tally.on_change = self.show

    def __exit__(self, *exception: object) -> None:
        if self.status:
            self.status.stop()
        if self.tally.total:
            self.console.print(self.text())

    def show(self, tally: Tally) -> None:
        now = time.monotonic()
        if self.status:
            self.status.update(self.text())
        elif now - self.shown > _SECONDS_BETWEEN_LINES:
            self.shown = now
            self.console.print(self.text())

    def text(self) -> str:
        tally, seconds = self.tally, time.monotonic() - self.started
        done = tally.done + tally.elsewhere
        rate = done / seconds if seconds else 0.0
        left = clock((tally.total - done) / rate) if rate else "?"
        parts = [
            f"{done:,}/{tally.total:,}",
            f"{rate:,.1f} items/s",
            f"{left} left",
            f"{size_text(tally.bytes_written)} written",
        ]
        if tally.reasons:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in tally.reasons.most_common())
            parts.append(f"failed: {reasons}")
        return " · ".join(parts)
