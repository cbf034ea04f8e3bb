"""The `longtake` command: finds the program and hands it the rest of the line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

_COMMANDS = {
    "clips": "put the quickstart's real clips and their manifests into a folder",
    "train": "train a model on a manifest of clips",
    "sample": "generate videos or images from a run's checkpoint",
    "convert": "read public weights strictly; write safetensors or diffusers' layout",
    "doctor": "check this environment, a manifest, or both",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 for success, 2 for a mistake the user can mend."""
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
        return _program(name)(rest)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
