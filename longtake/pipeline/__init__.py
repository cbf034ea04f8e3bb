"""Where data, encoders, objective and model meet: from a batch to a loss, from noise to a video."""

from longtake.pipeline.clips import write_clips
from longtake.pipeline.generate import Request, generate, to_uint8
from longtake.pipeline.inputs import Inputs, encode_batch
from longtake.pipeline.loss import training_loss
from longtake.pipeline.step import StepResult, Trainee, training_step
from longtake.pipeline.validate import validation_loss

__all__ = [
    "Inputs",
    "Request",
    "StepResult",
    "Trainee",
    "encode_batch",
    "generate",
    "to_uint8",
    "training_loss",
    "training_step",
    "validation_loss",
    "write_clips",
]
