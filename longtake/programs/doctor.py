"""Doctor: what this machine can run, whether it computes right, and whether a manifest is fit to
train on.

Attention backends, codecs and packages are tried, not looked up: a line that says ok has run.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longtake.config import RunConfig, load_yaml, preset
from longtake.data import DataConfig, ManifestHealth, inspect_manifest, open_manifest

_OPTIONAL = {
    "triton": "fused kernels (comes with CUDA builds of PyTorch)",
    "diffusers": "video autoencoders: pip install 'longtake[pretrained]'",
    "transformers": "T5 text encoders: pip install 'longtake[pretrained]'",
    "tensorboard": "TensorBoard logs: pip install 'longtake[train]'",
    "matplotlib": "loss plots: pip install 'longtake[train]'",
    "pyarrow": "Parquet manifests: pip install 'longtake[train]'",
    "wandb": "Weights & Biases: pip install 'longtake[wandb]'",
}
_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4", "mpeg2video", "prores", "mjpeg")


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Check this environment; with a manifest, also decode its samples and say which are usable."""

    numerics: bool = False
    """Also compare every fused operation with plain torch, forward and backward."""
    manifest: str | None = None
    """Manifest to check: CSV, JSONL or Parquet."""
    preset: str | None = None
    """Check against this preset's buckets and frame rate."""
    config: str | None = None
    """Check against this YAML file instead of a preset."""
    max_samples: int | None = None
    """Check only the first so many samples."""
    processes: int = 4
    """How many decode at once, or compare operations on a GPU; 0 compares in this one."""


@dataclass(frozen=True)
class _Finding:
    subject: str
    ok: bool | None  # None: absent, but nothing needs it
    text: str


def main(arguments: Sequence[str]) -> int:
    """`longtake doctor`: 0 when nothing is wrong, 1 otherwise."""
    command = tyro.cli(DoctorCommand, prog="longtake doctor", args=list(arguments))
    if command.processes < 0:
        raise ValueError(f"--processes {command.processes}: expected 0 or more")
    console = Console()
    findings = [*_machine(), *_attention(), *_processes(), *_codecs(), *_packages()]
    console.print(_table("Environment", findings))
    healthy = all(finding.ok is not False for finding in findings)
    if command.numerics:
        healthy &= _print_numerics(console, command.processes)
    if command.manifest:
        config = replace(_data_config(command), manifest=command.manifest)
        health = inspect_manifest(
            config,
            open_manifest(config),
            processes=command.processes,
            max_samples=command.max_samples,
        )
        healthy &= _print_health(console, health)
    return 0 if healthy else 1


def _data_config(command: DoctorCommand) -> DataConfig:
    if command.preset and command.config:
        raise ValueError("--preset and --config both name a configuration: give one of them")
    if command.config:
        return load_yaml(command.config, RunConfig).data
    if command.preset:
        return preset(command.preset).data
    return RunConfig().data


def _machine() -> list[_Finding]:
    python = platform.python_version()
    findings = [
        _Finding("Python", True, f"{python} on {platform.system()} {platform.machine()}"),
        _Finding("PyTorch", True, f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            text = f"{properties.name}, {memory}, {capability}, CUDA {torch.version.cuda}"
            findings.append(_Finding(f"GPU {index}", True, text))
    else:
        findings.append(_Finding("GPU", None, "none: the CPU path is used"))
    free = shutil.disk_usage(".").free / 2**30
    text = f"{free:.0f} GiB free here"
    findings.append(
        _Finding("Disk", free > 5, text if free > 5 else f"{text}: too little to train")
    )
    return findings


def _attention() -> list[_Finding]:
    """Each attention backend of PyTorch, forward and backward, on heads of 72 as in XL models."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if on_gpu:
        backends += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    findings = []
    for backend in backends:

        def attend(backend: SDPBackend = backend) -> str:
            q = torch.randn(2, 16, 64, 72, device=device, dtype=dtype, requires_grad=True)
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
            assert q.grad is not None
            finite = bool(q.grad.isfinite().all())
            if not finite:
                raise RuntimeError("gradients are not finite")
            return f"forward and backward run in {str(dtype).removeprefix('torch.')} on {device}"

        name = backend.name.lower().replace("_", " ")
        name = name if "attention" in name else f"{name} attention"
        # Only the math backend must exist everywhere.
        findings.append(_try(name, attend, needed=backend is SDPBackend.MATH))
    return findings


def _processes() -> list[_Finding]:
    available = [name for name in ("gloo", "nccl") if _has_backend(name)]
    text = ", ".join(available) if available else "no process-group backend in this PyTorch"
    return [_Finding("Process groups", bool(available), text)]


def _has_backend(name: str) -> bool:
    check = getattr(torch.distributed, f"is_{name}_available", None)
    return bool(torch.distributed.is_available() and check and check())


def _codecs() -> list[_Finding]:
    import av

    usable = [name for name in _CODECS if name in av.codecs_available]
    missing = [name for name in _CODECS if name not in usable]
    text = f"PyAV {av.__version__} decodes {', '.join(usable)}"
    if missing:
        text += f"; not {', '.join(missing)}"
    return [
        _Finding("Video decoding", bool(usable), text),
        _try("Video encoding", _encode_and_decode, needed=True),
    ]


def _encode_and_decode() -> str:
    from longtake.data import read_clip, write_video

    frames = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        write_video(path, frames, fps=8)
        clip = read_clip(path, num_frames=4)
    return f"H.264 mp4 written and read back, {tuple(clip.shape)}"


def _packages() -> list[_Finding]:
    findings = []
    for name, purpose in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            findings.append(_Finding(name, None, f"not installed; {purpose}"))
        else:
            findings.append(_Finding(name, True, metadata.version(name)))
    return findings


def _try(subject: str, action: Callable[[], str], *, needed: bool) -> _Finding:
    try:
        return _Finding(subject, True, action())
    except Exception as error:  # A probe may fail in any way; the failure is the finding.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return _Finding(subject, False if needed else None, f"not usable: {reason}")


def _table(title: str, findings: list[_Finding]) -> Table:
    marks = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "[dim]absent[/]"}
    table = Table(title=title, title_justify="left", show_header=False)
    for finding in findings:
        table.add_row(marks[finding.ok], finding.subject, escape(finding.text))
    return table


def _print_numerics(console: Console, processes: int) -> bool:
    """Compare implementations with plain torch, a line each as it comes; whether all are right."""
    from longtake.ops import numerics  # defines every kernel, which takes a moment
    from longtake.ops.numerics_apart import run_checks_apart

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"\nOperations on {device}: largest error against float64, and what is allowed")
    absent = numerics.absent(device)
    if device.type == "cpu" and "triton" in absent:
        console.print("There are no fused kernels to check on a CPU: only PyTorch's attention is.")
    else:
        for name, problem in absent.items():
            console.print(f"{name} is not checked: {problem}", markup=False, soft_wrap=True)
    start, num_checks, num_failed = time.perf_counter(), 0, 0
    # On a GPU nearly all of the time is compiling, on a CPU computing.
    if device.type == "cuda" and processes:
        results = run_checks_apart(numerics.checks(device), device, processes)
    else:
        results = numerics.run_checks(device)
    for result in results:
        check = result.check
        columns = (
            f"{check.operation:18}  {check.implementation:6}  {check.dtype_name:8}  "
            f"{check.shape_name:24}  {result.error:7.1e} / {result.allowed:7.1e}  "
        )
        verdict = "[green]pass[/]" if result.passed else f"[red]FAIL[/] {escape(result.detail)}"
        console.print(columns + verdict, highlight=False, soft_wrap=True)
        num_checks, num_failed = num_checks + 1, num_failed + (not result.passed)
    seconds = time.perf_counter() - start
    console.print(f"{num_checks} checks in {seconds:.0f} s, {num_failed} failed", highlight=False)
    return num_failed == 0


def _print_health(console: Console, health: ManifestHealth) -> bool:
    """Print a manifest's health; whether every sample can be read and every bucket filled."""
    count, bad = len(health.samples), health.bad
    table = Table(title=f"Manifest {health.manifest}", title_justify="left", show_header=False)
    table.add_row("samples", f"{count} checked, {len(bad)} unreadable, {health.num_images} images")
    table.add_row("video", f"{health.seconds:,.1f} seconds in all")
    table.add_row("captions", f"{count - health.num_without_caption} of {count}")
    labels = f"{count - health.num_without_label} of {count}, {health.num_classes} classes"
    table.add_row("labels", labels)
    if health.ignored_columns:
        table.add_row("ignored columns", ", ".join(health.ignored_columns))
    console.print(table)

    buckets = Table(title="Buckets", title_justify="left")
    for heading in (
        "frames x height x width",
        "samples",
        "steps per epoch",
        "enlarged",
        "left out",
    ):
        buckets.add_column(heading)
    for entry in health.buckets:
        left_out = ", ".join(f"{number} {reason}" for reason, number in entry.excluded.items())
        buckets.add_row(
            str(entry.bucket),
            str(entry.num_samples),
            f"{entry.steps_per_epoch:.2f}",
            str(entry.num_enlarged),
            left_out or "none",
        )
    console.print(buckets)
    for sample in bad:
        console.print(f"unreadable: {sample}", markup=False, highlight=False, soft_wrap=True)
    return not bad and all(entry.num_samples for entry in health.buckets)
