"""The `longtake` command: finds the program and hands it the rest of the line."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_COMMANDS = {
    "clips": "put the quickstart's real clips and their manifests into a folder",
    "encode": "encode a manifest's clips and captions once, into a latent store to train from",
    "train": "train a model on a manifest of clips, or on a latent store",
    "sample": "generate videos or images from a run's checkpoint",
    "convert": "read public weights strictly; write safetensors or diffusers' layout",
    "plan": "arithmetic beforehand: the space of a data set's encodings, the layout of a run",
    "doctor": "check this environment, a manifest, or both",
    "bench": "measure how fast this machine trains, beside plain torch and a floor",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit status is 0 for success, 2 for a mistake the user can mend, 1 for a
    run that failed and 75 for one that was asked to stop and has saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from longtake import __version__

        print(f"longtake {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_COMMANDS)}"
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            if not {"-h", "--help"} & set(rest):  # a run that ends with its reader says so
                print("error: nobody reads the output any more", file=sys.stderr)
            return 128 + signal.SIGPIPE
        status = _status(error)
        if status is None:
            raise
        _tell(error)
        return status


def _run(name: str, rest: Sequence[str]) -> int:
    try:
        status = _program(name)(rest)
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends
    return status


def _nobody_reads() -> bool:
    """Whether whoever read the output has gone, as `head` does; then nothing more is written."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)  # asks for errors alone
    has_gone = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if has_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return has_gone


def _status(error: Exception) -> int | None:
    """The exit status for an error that its message explains; None for one that is our mistake and
    needs its traceback."""
    # Commands have imported these already; `longtake --help` must not.
    from longtake.data import LoaderError, MediaError, TooManyBadSamples
    from longtake.parallel import PeerError
    from longtake.store import ClusterError
    from longtake.training import CheckpointError, FolderInUseError

    failures = (CheckpointError, ClusterError, FloatingPointError, LoaderError, PeerError)
    failures += (TooManyBadSamples,)
    if isinstance(error, failures):
        return 1
    if isinstance(error, (FolderInUseError, MediaError)):
        return 2
    if isinstance(error, ImportError):
        return 2 if "pip install" in str(error) else None
    if isinstance(error, OSError) and error.filename is not None:
        return 2
    if isinstance(error, (ValueError, OSError)):
        # Raised by our own checks, not somewhere inside a library.
        frames = traceback.extract_tb(error.__traceback__)
        return 2 if Path(frames[-1].filename).is_relative_to(Path(__file__).parent) else None
    return None


def _tell(error: Exception) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # What fails alike everywhere, the first process tells, and its end ends this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    where = "" if rank == "0" else f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr)


def _program(name: str) -> Callable[[Sequence[str]], int]:
    # Imported when asked for: torch alone takes seconds, and no command needs every program.
    import importlib

    return importlib.import_module(f"longtake.programs.{name}").main


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = ["usage: longtake COMMAND [options]", "", "commands:"]
    lines += [f"  {name:{width}}  {what}" for name, what in _COMMANDS.items()]
    lines += ["", "longtake COMMAND --help lists a command's options."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
