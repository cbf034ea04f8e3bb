"""The rows of Open-Sora 1.0's tables of speed: what each measures here, and what was printed there.

Its page on acceleration has three tables, of 8 H800 GPUs, with encoders on-line in every video row.
Three of the rows are labelled otherwise than their own figures allow (tokens/s must be samples/s
times tokens a sample); their notes say so. Its "DiT" with several frames is PixArt with attention
over all tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from longtake.benchmark.records import Encoders, Figure
from longtake.config import RunConfig, preset, with_encoder_weights
from longtake.data import Bucket
from longtake.models import ModelConfig
from longtake.parallel import ParallelConfig

TABLES = ("images", "video", "encoders")


@dataclass(frozen=True)
class Policy:
    """What a row's blocks keep."""

    checkpointing: str
    kept_blocks: int = 0
    pieces: str = "all"
    offload: bool = False
    kept_inputs: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Policy:
        """That of a run."""
        return cls(**{field.name: getattr(config.parallel, field.name) for field in fields(cls)})

    def on(self, config: RunConfig) -> RunConfig:
        """The same run under this policy."""
        chosen: Any = asdict(self)
        return replace(config, parallel=replace(config.parallel, **chosen))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration to be timed, and figures to stand beside it."""

    key: str
    title: str
    table: str
    config: RunConfig
    encoders: Encoders = "absent"
    micro_batch: int | None = None
    """None: the best is searched."""
    policies: tuple[Policy, ...] = (Policy("none"),)
    """Activation checkpointing: the first that fits into memory."""
    has_plain: bool = True
    """Whether the same on plain torch is measured beside it."""
    baseline: str | None = None
    """The key of the row whose speed this one is compared with."""
    gpus: int = 1
    """One process each. With several, no micro-batch is searched: None takes the baseline's."""
    printed: tuple[Figure, ...] = ()
    known: tuple[Figure, ...] = ()


def _printed(what: str, samples_per_second: float, note: str = "") -> Figure:
    """As Open-Sora's page prints it, per GPU."""
    figure = {"what": what, "samples_per_second": samples_per_second}
    return Figure(**figure, gpu="H800 (one of 8)", note=note)


def _known(what: str, samples_per_second: float, note: str = "") -> Figure:
    """The best of what a user could run instead, measured 2026-11-22 on one H200 with PyTorch
    2.11, CUDA events, random data, no encoders, no EMA."""
    figure = {"what": what, "samples_per_second": samples_per_second}
    return Figure(**figure, gpu="H200", note=note)


_META = _known("DiT's original model, bf16, SDPA, torch.compile of the model, batch 128", 576)
_MISLABELLED = (
    "printed as 64x512, but its tokens/s are samples/s times the 16,384 tokens of 16x512, and the "
    "accelerated pair equals the page's own 16x512 row"
)
_PER_PAIR = (
    "per pair of GPUs: times 368,640 tokens it is twice the printed 18k tokens/s/GPU, so 0.05 a GPU"
)


def rows(table: str) -> list[Row]:
    """The rows of a table, or of "all", the cheapest first."""
    chosen = [row for row in _ROWS if table in (row.table, "all")]
    if not chosen:
        raise ValueError(f"table={table} does not exist: use {', '.join(TABLES)} or all")
    return chosen


def tiny(row: Row) -> Row:
    """The same row in a size that a laptop's processor runs in a second: to try the command."""
    config = row.config
    buckets = tuple(
        replace(bucket, num_frames=min(bucket.num_frames, 4), height=32, width=32, batch_size=2)
        for bucket in config.data.buckets
    )
    quickstart = preset("quickstart")
    channels = quickstart.model.in_channels
    has_text = config.text_encoder.kind != "none"
    model = replace(
        config.model,
        size="tiny",
        depth=1,
        in_channels=channels,
        caption_channels=quickstart.text_encoder.channels if has_text else 4096,
        max_caption_tokens=quickstart.text_encoder.max_tokens if has_text else 120,
    )
    config = replace(
        config,
        model=model,
        data=replace(config.data, buckets=buckets),
        video_encoder=quickstart.video_encoder,
        text_encoder=quickstart.text_encoder if has_text else config.text_encoder,
        sampling=replace(
            config.sampling, sampler=replace(config.sampling.sampler, guidance_channels=None)
        ),
    )
    title = f"tiny stand-in for {row.title}"
    policies = tuple(replace(policy, kept_blocks=0, kept_inputs=0) for policy in row.policies)
    return replace(
        row, title=title, config=config, micro_batch=2, policies=policies, printed=(), known=()
    )


def _video(
    key: str,
    title: str,
    name: str,
    model: ModelConfig | None = None,
    *,
    frames: int | None = None,
    side: int | None = None,
    table: str = "video",
    **fields: object,
) -> Row:
    """A row of a preset, perhaps of another model or at another size, with random encoders."""
    config = preset(name)
    bucket = config.data.buckets[0]
    bucket = Bucket(
        num_frames=frames or bucket.num_frames,
        height=side or bucket.height,
        width=side or bucket.width,
        batch_size=1,
    )
    config = replace(
        with_encoder_weights(config, "random"),
        model=model or config.model,
        data=replace(config.data, buckets=(bucket,)),
    )
    return Row(key=key, title=title, table=table, config=config, **fields)  # pyright: ignore[reportArgumentType]


def _on_line(
    size: str, name: str, *, micro_batch: int, unsliced: int, printed: dict[str, tuple[Figure, ...]]
) -> list[Row]:
    """The encoders' rows of a preset, one change a row and all at one micro-batch.

    The baseline has the encoders of that page's: T5 in fp32 over all tokens, the VAE eager and in
    the largest calls that kernels can index, `unsliced` frames.
    """
    best = _video(
        f"stdit-{size}-on-line",
        f"STDiT-XL/2 {size}, encoders on-line",
        name,
        table="encoders",
        encoders="on-line",
        micro_batch=micro_batch,
        policies=_policies(),
        has_plain=False,
        baseline=f"stdit-{size}-on-line-baseline",
        printed=printed.get("both", ()),
    )
    serial = best.config
    slow_t5 = replace(serial.text_encoder, dtype="fp32", compile=False, num_lengths=1)
    slow_vae = replace(serial.video_encoder, compile=False, frames_per_call=unsliced)

    def row(suffix: str, what: str, config: RunConfig, **fields: object) -> Row:
        return replace(
            best,
            key=f"{best.key}-{suffix}",
            title=f"STDiT-XL/2 {size}, {what}",
            config=config,
            **({"printed": printed.get(suffix, ())} | fields),  # pyright: ignore[reportArgumentType]
        )

    return [
        row(
            "baseline",
            "baseline: T5 in fp32, VAE eager in the largest calls, in turn",
            replace(serial, text_encoder=slow_t5, video_encoder=slow_vae),
            has_plain=True,
        ),
        row("fast-t5", "faster T5 alone", replace(serial, video_encoder=slow_vae)),
        row("fast-vae", "faster VAE alone", replace(serial, text_encoder=slow_t5)),
        row("serial", "both, in turn", serial),
        replace(best, title=f"STDiT-XL/2 {size}, both, encoding ahead", config=_ahead(serial)),
        replace(
            best,
            key=f"stdit-{size}-cached",
            title=f"STDiT-XL/2 {size}, encodings from a store",
            encoders="cached",
            printed=(),
        ),
    ]


def _ahead(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, encode_ahead=True))


def _on_two(
    key: str,
    title: str,
    name: str,
    baseline: str | None,
    *,
    sp: int = 1,
    table: str = "video",
    micro_batch: int | None = None,
    policies: tuple[Policy, ...] | None = None,
    **fields: object,
) -> Row:
    """The row of a preset on two GPUs, which take samples each or share their tokens.

    An XL's weights are 1.4 GiB in bf16: gathering them again for the backward saves little.
    """
    own = Policy.of(preset(name))
    row = _video(
        key,
        title,
        name,
        table=table,
        gpus=2,
        has_plain=False,
        baseline=baseline,
        micro_batch=micro_batch,
        policies=policies or (own,),
        **fields,  # pyright: ignore[reportArgumentType]
    )
    parallel = replace(row.config.parallel, sp=sp, zero=2)
    return replace(row, config=replace(row.config, parallel=parallel))


def _policies() -> tuple[Policy, ...]:
    """All of them, from the fastest to the one that needs least memory."""
    names = get_args(get_type_hints(ParallelConfig)["checkpointing"])
    return tuple(Policy(name) for name in names)


_FULL_256 = preset("pixart-xl2-16x256").model
_FULL_512 = replace(_FULL_256, space_scale=1.0)

_ON_LINE_256 = _on_line(
    "16x256",
    "stdit-xl2-16x256",
    micro_batch=16,
    unsliced=128,
    printed={
        "both": (_printed("w. faster T5, 16x256 (also the row STDiT 16x256)", 7.00),),
        "baseline": (_printed("Baseline, 16x256", 6.16),),
    },
)
_ON_LINE_512 = _on_line(
    "16x512",
    "stdit-xl2-16x512",
    micro_batch=4,
    unsliced=32,
    printed={
        "both": (_printed("w. both, 64x512", 1.45, _MISLABELLED),),
        "baseline": (_printed("Baseline, 64x512", 0.94, _MISLABELLED),),
    },
)
_ON_LINE_64 = _on_line(
    "64x512",
    "stdit-xl2-64x512",
    micro_batch=1,
    unsliced=32,
    printed={"both": (_printed("STDiT (GC) 64x512", 0.40),)},
)

# From the cheapest to the dearest step, so that a run which is cut short has most of them.
_ROWS = (
    _video(
        "dit-256",
        "DiT-XL/2 256x256",
        "dit-xl2-256",
        table="images",
        known=(_META,),
    ),
    _video(
        "dit-256-batch128",
        "DiT-XL/2 256x256, micro-batch 128",
        "dit-xl2-256",
        table="images",
        micro_batch=128,
        printed=(
            _printed("DiT", 100),
            _printed("OpenDiT", 175),
            _printed("OpenSora", 175),
        ),
        known=(_META,),
    ),
    _on_two(
        "dit-256-dp2",
        "DiT-XL/2 256x256, dp=2",
        "dit-xl2-256",
        "dit-256-batch128",
        table="images",
        policies=(Policy("none"),),
    ),
    _video(
        "dit-256-on-line",
        "DiT-XL/2 256x256, VAE on-line",
        "dit-xl2-256",
        table="images",
        encoders="on-line",
    ),
    _video(
        "stdit-16x256",
        "STDiT-XL/2 16x256",
        "stdit-xl2-16x256",
        printed=(_printed("STDiT 16x256", 7.00, "encoders on-line"),),
        known=(
            _known("Open-Sora 1.0's model, no checkpointing, compiled per block, batch 16", 22.2),
        ),
    ),
    _on_two(
        "stdit-16x256-dp2",
        "STDiT-XL/2 16x256, dp=2",
        "stdit-xl2-16x256",
        "stdit-16x256",
        policies=(Policy("none"),),
    ),
    _video(
        "full-16x256",
        "full attention (PixArt-XL/2) 16x256",
        "pixart-xl2-16x256",
        printed=(_printed("DiT 16x256", 7.20, "encoders on-line"),),
        known=(_known("Open-Sora 1.0's PixArt, SDPA, batch 16", 16.2),),
    ),
    _video(
        "stdit-16x512",
        "STDiT-XL/2 16x512",
        "stdit-xl2-16x512",
        printed=(_printed("STDiT 16x512", 1.45, "encoders on-line"),),
        known=(
            _known("Open-Sora 1.0's model, no checkpointing, compiled per block, batch 4", 4.90),
        ),
    ),
    *_ON_LINE_256,
    _video(
        "full-16x512",
        "full attention (PixArt-XL/2) 16x512",
        "pixart-xl2-16x256",
        _FULL_512,
        side=512,
        printed=(_printed("DiT 16x512", 0.85, "encoders on-line"),),
        known=(_known("Open-Sora 1.0's PixArt, SDPA, batch 4", 1.93),),
    ),
    _video(
        "stdit-64x512",
        "STDiT-XL/2 64x512",
        "stdit-xl2-64x512",
        policies=_policies(),
        printed=(_printed("STDiT (GC) 64x512", 0.40, "encoders on-line"),),
        known=(_known("Open-Sora 1.0's model, checkpointing, batch 4", 0.71),),
    ),
    _on_two(
        "stdit-64x512-dp2",
        "STDiT-XL/2 64x512, dp=2",
        "stdit-xl2-64x512",
        "stdit-64x512",
        micro_batch=1,
        policies=_policies(),
    ),
    # As many samples in a step, and tokens on a GPU, as with dp=2; and one sample, done sooner.
    _on_two(
        "stdit-64x512-sp2",
        "STDiT-XL/2 64x512, sp=2",
        "stdit-xl2-64x512",
        "stdit-64x512-dp2",
        sp=2,
        micro_batch=2,
        policies=_policies(),
    ),
    _on_two(
        "stdit-64x512-sp2-one",
        "STDiT-XL/2 64x512, sp=2, one sample",
        "stdit-xl2-64x512",
        "stdit-64x512-dp2",
        sp=2,
        micro_batch=1,
        policies=_policies(),
    ),
    *_ON_LINE_512,
    *_ON_LINE_64,
    _video(
        "stdit-360x512",
        "STDiT-XL/2 360x512",
        "stdit-xl2-360x512",
        micro_batch=1,
        policies=(Policy("full"),),
        printed=(_printed("STDiT (GC, sp=2) 360x512", 0.10, _PER_PAIR),),
        known=(_known("Open-Sora 1.0's sequence parallelism on 2 GPUs, checkpointing", 0.102),),
    ),
    _on_two(
        "stdit-360x512-dp2",
        "STDiT-XL/2 360x512, dp=2",
        "stdit-xl2-360x512",
        "stdit-360x512",
        micro_batch=1,
    ),
    _on_two(
        "stdit-360x512-sp2",
        "STDiT-XL/2 360x512, sp=2",
        "stdit-xl2-360x512",
        "stdit-360x512-dp2",
        sp=2,
        micro_batch=1,
        policies=(Policy("full", kept_blocks=13), Policy("full", kept_blocks=11), Policy("full")),
        printed=(_printed("STDiT (GC, sp=2) 360x512", 0.10, _PER_PAIR),),
        known=(_known("Open-Sora 1.0's sequence parallelism on 2 GPUs, checkpointing", 0.102),),
    ),
    # All inputs of blocks would be more than the 128 GiB of a machine with one H200.
    _video(
        "stdit-1min-1080p",
        "STDiT-XL/2 one minute of 1080p",
        "stdit-xl2-1min-1080p",
        micro_batch=1,
        policies=(Policy("nested", offload=True, kept_inputs=11),),
        has_plain=False,
    ),
    _on_two(
        "stdit-1min-1080p-sp2",
        "STDiT-XL/2 one minute of 1080p, sp=2",
        "stdit-xl2-1min-1080p",
        "stdit-1min-1080p",
        sp=2,
        micro_batch=1,
        policies=(
            Policy("nested", pieces="pointwise", offload=True, kept_inputs=20),
            Policy.of(preset("stdit-xl2-1min-1080p")),
        ),
    ),
    _video(
        "full-64x512",
        "full attention (PixArt-XL/2) 64x512",
        "pixart-xl2-16x256",
        replace(_FULL_512, time_scale=2 / 3),
        frames=64,
        side=512,
        policies=_policies(),
        printed=(_printed("DiT (GC) 64x512", 0.08, "encoders on-line"),),
        known=(_known("Open-Sora 1.0's PixArt, SDPA, checkpointing, batch 1", 0.121),),
    ),
)
