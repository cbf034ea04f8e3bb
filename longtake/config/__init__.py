"""What a run is: composed dataclasses, named presets, files and dotted overrides."""

from longtake.config.checks import check_conditions, check_parts
from longtake.config.command_line import (
    TrainCommand,
    as_options,
    override,
    parse_run,
    parse_train,
    with_encoder_weights,
)
from longtake.config.files import dump_yaml, from_plain, load_yaml, to_plain
from longtake.config.layers import attention_layers, kernels_by_layer, ring_size, verify_kernels
from longtake.config.presets import PRESETS, preset
from longtake.config.record import run_record
from longtake.config.resume import changes
from longtake.config.run import RunConfig, SamplingConfig, TrainConfig, ValidationConfig
from longtake.config.work import (
    Work,
    largest_peak,
    latents_of_bucket,
    peak_of_grid,
    predicted_peak,
    throughput_meter,
    token_notes,
    work_of_latents,
    work_of_step,
)

__all__ = [
    "PRESETS",
    "RunConfig",
    "SamplingConfig",
    "TrainCommand",
    "TrainConfig",
    "ValidationConfig",
    "Work",
    "as_options",
    "attention_layers",
    "changes",
    "check_conditions",
    "check_parts",
    "dump_yaml",
    "from_plain",
    "kernels_by_layer",
    "largest_peak",
    "latents_of_bucket",
    "load_yaml",
    "override",
    "parse_run",
    "parse_train",
    "peak_of_grid",
    "predicted_peak",
    "preset",
    "ring_size",
    "run_record",
    "throughput_meter",
    "to_plain",
    "token_notes",
    "verify_kernels",
    "with_encoder_weights",
    "work_of_latents",
    "work_of_step",
]
