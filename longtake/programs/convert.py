"""`longtake convert`: weights from one layout into another, with an account of every key.

longtake convert PixArt-XL-2-512x512.pth --init-stdit-from-pixart --output stdit.safetensors
longtake convert DiT-XL-2-256x256.pt --to diffusers --output dit-diffusers
longtake convert ucf101.pt --report account.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from torch import nn

from longtake.config import RunConfig, load_yaml
from longtake.models import ModelConfig, build_model_from_config, init_weights
from longtake.training import (
    CheckpointError,
    RunFolder,
    find_checkpoint,
    load_weights_for_inference,
)
from longtake.weights import (
    CONFIG_KEY,
    Account,
    Inferred,
    Layout,
    LoadError,
    WeightsError,
    WeightsFile,
    config_of_file,
    config_to_json,
    export_diffusers,
    export_safetensors,
    load_file,
    read_weights,
    stdit_from_pixart,
    with_positions,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Read weights strictly, print what became of every key, and write them for others."""

    source: tyro.conf.Positional[str]
    """A .pt, .pth or .safetensors file, a folder of safetensors, a run's folder (its newest
    checkpoint is taken) or one checkpoint; of runs, the averaged weights."""
    output: str | None = None
    """The .safetensors file or the diffusers folder to write; nothing is written without it."""
    to: Literal["safetensors", "diffusers"] = "safetensors"
    """The layout to write."""
    model: Literal["auto", "dit", "pixart", "stdit", "stdit2", "latte"] = "auto"
    """The model that the source must hold; auto finds it from the keys."""
    init_stdit_from_pixart: bool = False
    """Make an STDiT that starts as the source's PixArt on every frame."""
    wrapper: str | None = None
    """The dictionary inside a .pt file that holds the weights: ema, state_dict, model, ..."""
    num_heads: int | None = None
    """Heads, where the size table does not tell: weights do not show them."""
    space_scale: float | None = None
    """Instead of the one read from the position buffer; so is the next."""
    base_size: int | None = None
    latent_size: tuple[int, int, int] | None = None
    """Latent frames, height and width. safetensors: store the position buffers for this size, which
    the original code wants. diffusers: the size its positions are laid out for."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of what is written."""
    report: str | None = None
    """Write the account as JSON to this file."""
    overwrite: bool = False
    """Replace files that exist."""
    seed: int = 0
    """For the tensors that --init-stdit-from-pixart has to draw."""
    allow_random_encoders: bool = False
    """Convert a run that was trained on encoders with random weights."""


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and converts."""
    return convert(tyro.cli(ConvertConfig, prog="longtake convert", args=list(arguments)))


def convert(config: ConvertConfig) -> int:
    """Reads, accounts and writes; the exit status is 1 after one message if something is wrong."""
    # In a file or a pipe the table may be as wide as it likes.
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        _check(config)
        file = _read(config)
        print(file.describe())
        inferred, layout = _identify(config, file)
        model, account = _load(config, file, inferred, layout)
        console.print(account)
        if config.report is not None:
            _report(config.report, account)
        if config.output is not None:
            files = _write(config, file, inferred, model)
            print(f"wrote {', '.join(map(str, files))}")
    except LoadError as error:
        if config.report is not None:
            _report(config.report, error.account)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def is_run_checkpoint(path: Path) -> bool:
    """Whether a folder is a run, or a checkpoint of one, rather than exported weights."""
    return (path / ".metadata").is_file() or RunFolder(path).has_checkpoints()


def state_from_checkpoint(path: Path, *, allow_random_encoders: bool) -> WeightsFile:
    """The EMA weights of a run's checkpoint, with the model's config under `CONFIG_KEY` in the
    metadata.

    Raises:
        WeightsError: the run used encoders with random weights and that was not allowed.
    """
    config = load_yaml(path / "config.yaml", RunConfig)
    if config.uses_random_encoders and not allow_random_encoders:
        raise WeightsError(
            f"{path} was trained with random encoder weights, so its weights mean nothing: to "
            "convert them all the same, for a test or a benchmark, add --allow-random-encoders"
        )
    with torch.device("meta"):
        model = build_model_from_config(config.model)
    model = model.to_empty(device="cpu")
    load_weights_for_inference(path, model)
    metadata = {CONFIG_KEY: config_to_json(config.model)}
    if config.uses_random_encoders:
        metadata["longtake.warning"] = "trained with random encoder weights"
    return WeightsFile(
        state=model.state_dict(), source=str(path), container="run", metadata=metadata
    )


# ------------------------------------------------------------------------------------- the steps


def _check(config: ConvertConfig) -> None:
    if config.init_stdit_from_pixart and config.to == "diffusers":
        raise ValueError("diffusers has no stdit: use --to safetensors")
    if config.init_stdit_from_pixart and config.model not in ("auto", "stdit"):
        raise ValueError(f"--init-stdit-from-pixart makes a stdit, not --model {config.model}")
    if config.report is not None and Path(config.report).exists() and not config.overwrite:
        raise ValueError(f"{config.report} exists already: choose another name or --overwrite")


def _read(config: ConvertConfig) -> WeightsFile:
    path = Path(config.source)
    if is_run_checkpoint(path):
        path = find_checkpoint(path)
        return state_from_checkpoint(path, allow_random_encoders=config.allow_random_encoders)
    return read_weights(path, wrapper=config.wrapper)


def _load(
    config: ConvertConfig, file: WeightsFile, inferred: Inferred, layout: Layout
) -> tuple[nn.Module, Account]:
    """The model with the file's weights, in the file's precision."""
    chosen = {"space_scale": config.space_scale, "base_size": config.base_size}
    overrides = {key: value for key, value in chosen.items() if value is not None}
    if not config.init_stdit_from_pixart:
        return load_file(
            file, layout=layout.name, num_heads=config.num_heads, dtype=None, **overrides
        )
    if inferred.config.name != "pixart":
        raise WeightsError(f"an STDiT starts from PixArt weights, but these are {layout.title}")
    # Like Open-Sora 1.0, whose STDiT never stretches its grid to a base size.
    own = {"name": "stdit", "base_size": None, "micro_conditioning": False, **overrides}
    with torch.device("meta"):
        model = build_model_from_config(replace(inferred.config, **own))
    model = model.to_empty(device="cpu")
    init_weights(model, seed=config.seed)
    account = stdit_from_pixart(model, file.state)
    return model, replace(account, warnings=(*inferred.notes, *account.warnings))


def _report(path: str, account: Account) -> None:
    Path(path).write_text(account.to_json() + "\n", encoding="utf-8")


def _identify(config: ConvertConfig, file: WeightsFile) -> tuple[Inferred, Layout]:
    """The model and layout of a file, and whether that is what was asked for."""
    inferred, layout = config_of_file(file, num_heads=config.num_heads)
    wanted = "pixart" if config.init_stdit_from_pixart else config.model
    if (wanted, layout.name) == ("latte", "dit"):
        # Without its buffers a Latte looks like a DiT: only the user can tell.
        return config_of_file(file, layout="latte", num_heads=config.num_heads)
    if wanted not in ("auto", layout.model):
        raise WeightsError(f"--model {wanted} was asked for, but the weights are {layout.title}")
    return inferred, layout


def _write(
    config: ConvertConfig, file: WeightsFile, inferred: Inferred, model: nn.Module
) -> list[Path]:
    assert config.output is not None
    dtype = None if config.dtype == "keep" else DTYPES[config.dtype]
    model_config: ModelConfig = model.config  # type: ignore[assignment]
    grid_THW = None
    if config.latent_size is not None:
        pt, ph, pw = model_config.patch_size
        frames, height, width = config.latent_size
        grid_THW = -(-frames // pt), -(-height // ph), -(-width // pw)
    if config.to == "diffusers":
        _, height, width = grid_THW or inferred.grid_THW
        if height != width:
            raise ValueError(f"diffusers wants a square size, not {height}x{width} patches")
        return export_diffusers(
            model,
            config.output,
            sample_size=None if height is None else height * model_config.patch_size[1],
            dtype=dtype,
            overwrite=config.overwrite,
        )
    state = model.state_dict()
    if grid_THW is not None:
        state = with_positions(state, model_config, grid_THW)
    kept = {k: v for k, v in file.metadata.items() if k.startswith("longtake.")}
    return export_safetensors(
        state,
        config.output,
        config=model_config,
        metadata={**kept, "longtake.made_from": Path(file.source).name},
        dtype=dtype,
        overwrite=config.overwrite,
    )
