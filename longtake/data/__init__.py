"""From videos, images and captions to batches, bucketed by shape, resumable at any position."""

from longtake.data.batch import BadSample, Batch, Samples, TooManyBadSamples, describe_bad
from longtake.data.clips import prepare_clips
from longtake.data.config import DataConfig
from longtake.data.files import MediaError
from longtake.data.health import BucketHealth, ManifestHealth, SampleHealth, inspect_manifest
from longtake.data.loader import (
    Loader,
    ValidationBatches,
    build_loader,
    open_manifest,
    validation_batches,
)
from longtake.data.manifest import NO_LABEL, Manifest, ManifestError, Sample, read_manifest
from longtake.data.source import MediaSource, Source, View
from longtake.data.stream import Bucket, LoaderState
from longtake.data.transforms import Fit
from longtake.data.video import MediaInfo, MediaLimits, probe, read_clip
from longtake.data.workers import LoaderError
from longtake.data.write import contact_sheet, write_image, write_video

__all__ = [
    "NO_LABEL",
    "BadSample",
    "Batch",
    "Bucket",
    "BucketHealth",
    "DataConfig",
    "Fit",
    "Loader",
    "LoaderError",
    "LoaderState",
    "Manifest",
    "ManifestError",
    "ManifestHealth",
    "MediaError",
    "MediaInfo",
    "MediaLimits",
    "MediaSource",
    "Sample",
    "SampleHealth",
    "Samples",
    "Source",
    "TooManyBadSamples",
    "ValidationBatches",
    "View",
    "build_loader",
    "contact_sheet",
    "describe_bad",
    "inspect_manifest",
    "open_manifest",
    "prepare_clips",
    "probe",
    "read_clip",
    "read_manifest",
    "validation_batches",
    "write_image",
    "write_video",
]
