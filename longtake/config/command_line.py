"""From command-line arguments to a run configuration: preset or file, then dotted overrides.

`longtake train --preset quickstart --train.steps 50 --data.buckets.0.height 64`
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from longtake.config.files import load_yaml
from longtake.config.presets import PRESETS, preset
from longtake.config.run import RunConfig

_TRAIN = (
    "Train a model. Start from --preset NAME or --config FILE, then override any key by its dotted "
    "name. --encoder-weights random builds the encoders untrained, for benchmarks; --dry-run "
    "prints the resolved configuration and stops; --fresh sets an existing run of that name aside "
    "instead of resuming it."
)


@dataclass(frozen=True)
class TrainCommand:
    """A parsed `longtake train` command line."""

    config: RunConfig
    dry_run: bool
    fresh: bool


def parse_train(arguments: Sequence[str]) -> TrainCommand:
    """Resolve the command line of `longtake train`.

    Raises: ValueError for what the user can mend; SystemExit(2) from the option parser itself.
    """
    base = argparse.ArgumentParser(prog="longtake train", add_help=False, allow_abbrev=False)
    base.add_argument("--dry-run", action="store_true")
    base.add_argument("--fresh", action="store_true")
    chosen, rest = base.parse_known_args(list(arguments))
    config = parse_run(rest, prog="longtake train", description=_TRAIN)
    return TrainCommand(config=config, dry_run=chosen.dry_run, fresh=chosen.fresh)


def parse_run(arguments: Sequence[str], *, prog: str, description: str) -> RunConfig:
    """Resolve `--preset` or `--config`, then apply the dotted overrides on top.

    `--set a.b=value` is another spelling of `--a.b value`. Raises as `parse_train`.
    """
    base = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    base.add_argument("--preset")
    base.add_argument("--config", help="a YAML file, for example a run's config.yaml")
    base.add_argument("--encoder-weights", choices=["pretrained", "random"])
    base.add_argument("--set", action="append", default=[])
    chosen, overrides = base.parse_known_args(list(arguments))
    if chosen.preset and chosen.config:
        raise ValueError("--preset and --config both name a whole configuration: give one of them")
    if chosen.config:
        config = load_yaml(chosen.config, RunConfig)
    else:
        config = preset(chosen.preset) if chosen.preset else RunConfig()
    if chosen.encoder_weights:
        config = with_encoder_weights(config, chosen.encoder_weights)
    overrides += as_options(chosen.set)
    return override(config, overrides, prog=prog, description=_with_presets(description))


def override(
    config: RunConfig, options: Sequence[str], *, prog: str, description: str = ""
) -> RunConfig:
    """The configuration with dotted options (`--model.size B`) applied."""
    return tyro.cli(
        RunConfig,
        prog=prog,
        description=description,
        default=config,
        args=list(options),
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def as_options(assignments: Sequence[str]) -> list[str]:
    """`model.size=B` as `--model.size B`. Raises: ValueError for anything else."""
    options = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {assignment}: expected key=value, as in model.size=B")
        options += [f"--{key}", value]
    return options


def with_encoder_weights(config: RunConfig, weights: str) -> RunConfig:
    """The same run with both encoders' weights "pretrained" or "random"."""
    return dataclasses.replace(
        config,
        video_encoder=dataclasses.replace(config.video_encoder, weights=weights),
        text_encoder=dataclasses.replace(config.text_encoder, weights=weights),
    )


def _with_presets(description: str) -> str:
    lines = [description, "", "Presets:"]
    for name, build in PRESETS.items():
        lines.append(f"  {name:20} {(build.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines)
