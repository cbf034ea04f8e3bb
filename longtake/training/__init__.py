"""What the training loop needs: optimizer, schedule, EMA, checkpoints, metrics, throughput,
stopping, and
the watch over a run that may hang."""

from longtake.training.bad_samples import BadSampleLog
from longtake.training.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    load_weights_for_inference,
)
from longtake.training.checkpoint_folder import CheckpointError, latest
from longtake.training.ema import Ema, EmaConfig
from longtake.training.lock import FolderInUseError, hold_run_folder
from longtake.training.mean_loss import MeanLoss
from longtake.training.metrics import MetricsConfig, MetricsLog, read_metrics
from longtake.training.optimizer import (
    OptimizerConfig,
    SkippedUpdates,
    build_optimizer,
)
from longtake.training.progress import ProgressBar, clock, show_log
from longtake.training.run_folder import RunFolder, environment, find_checkpoint
from longtake.training.schedule import ScheduleConfig, learning_rate
from longtake.training.stop import STOPPED_EXIT_CODE, StopRequest
from longtake.training.throughput import Throughput, ThroughputMeter, speed_metrics
from longtake.training.update import update_weights
from longtake.training.watchdog import Watchdog

__all__ = [
    "STOPPED_EXIT_CODE",
    "BadSampleLog",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "Ema",
    "EmaConfig",
    "FolderInUseError",
    "MeanLoss",
    "MetricsConfig",
    "MetricsLog",
    "OptimizerConfig",
    "ProgressBar",
    "RunFolder",
    "ScheduleConfig",
    "SkippedUpdates",
    "StopRequest",
    "Throughput",
    "ThroughputMeter",
    "Watchdog",
    "build_optimizer",
    "clock",
    "environment",
    "find_checkpoint",
    "hold_run_folder",
    "latest",
    "learning_rate",
    "load_weights_for_inference",
    "read_metrics",
    "show_log",
    "speed_metrics",
    "update_weights",
]
