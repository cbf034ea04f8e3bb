"""Where data, encoders, objective and model meet: from a batch to a loss, from noise to a video."""

from longtake.pipeline.ahead import EncodedStep, encoded_steps, in_turn
from longtake.pipeline.clips import write_clips
from longtake.pipeline.encoders import (
    build_encoders,
    ready_text_encoder,
    ready_video_encoder,
    text_placement,
)
from longtake.pipeline.generate import Request, generate, to_uint8
from longtake.pipeline.inputs import Inputs, encode_batch
from longtake.pipeline.loss import training_loss
from longtake.pipeline.run_encoders import encoders_of_source, release, text_config_of_source
from longtake.pipeline.shared import SharedEncoding, share_encoding
from longtake.pipeline.step import StepResult, Trainee, training_step
from longtake.pipeline.validate import validation_loss

__all__ = [
    "EncodedStep",
    "Inputs",
    "Request",
    "SharedEncoding",
    "StepResult",
    "Trainee",
    "build_encoders",
    "encode_batch",
    "encoded_steps",
    "encoders_of_source",
    "generate",
    "in_turn",
    "ready_text_encoder",
    "ready_video_encoder",
    "release",
    "share_encoding",
    "text_config_of_source",
    "text_placement",
    "to_uint8",
    "training_loss",
    "training_step",
    "validation_loss",
    "write_clips",
]
