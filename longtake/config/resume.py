"""What a resumed run may change, and what would make it another run."""

from __future__ import annotations

import dataclasses
from typing import Any

from longtake.config.run import RunConfig

# Everything else would make it another run.
_MAY_CHANGE = (
    "name",
    "output",
    "train.steps",
    "train.accumulation",
    "train.encode_ahead",
    "train.log_every_steps",
    "train.init_from",
    "optimizer",
    "schedule",
    "validation",
    "sampling",
    "checkpoint",
    "metrics",
    "parallel",
    "data.root",
    "data.allow_outside_root",
    "data.num_workers",
    "data.prefetch_batches",
    "data.worker_timeout_seconds",
    "data.max_bad_fraction",
    "data.bad_grace",
    "video_encoder.frames_per_call",
    "video_encoder.memory_gib",
    "video_encoder.compile",
    "video_encoder.channels_last",
    "video_encoder.path",
    "text_encoder.num_lengths",
    "text_encoder.compile",
    "text_encoder.placement",
    "text_encoder.path",
    "text_encoder.tokenizer_path",
)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs, one `key: old → new` a line.

    Raises: ValueError if something differs that a resumed run must keep.
    """
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    lines = {key: f"{key}: {old.get(key)} → {new.get(key)}" for key in keys}
    refused = [text for key, text in lines.items() if not _may_change(key)]
    if refused:
        raise ValueError(
            "this folder holds a run with another configuration; to resume it, keep\n  "
            + "\n  ".join(refused)
            + "\nor start anew with --fresh (the old folder is set aside) or another --name"
        )
    return list(lines.values())


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys; tuples of dataclasses by index."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        items = [(str(index), item) for index, item in enumerate(config)]
    else:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)
