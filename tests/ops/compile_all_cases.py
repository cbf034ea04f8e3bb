"""Compiles every kernel of the `*_cases.py` files beside this one for one GPU and prints what they
take, as JSON: `python -m tests.ops.compile_all_cases 90`. Runs without TRITON_INTERPRET."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.ops.compile_only import compile_only


def main(capability: int) -> None:
    found = {}
    for path in sorted(Path(__file__).parent.glob("*_cases.py")):
        if path.stem == Path(__file__).stem:
            continue
        for name, launch in importlib.import_module(f"tests.ops.{path.stem}").compile_cases():
            with compile_only(capability) as compiled:
                launch()
            found |= {f"{name}: {kernel}": asdict(taken) for kernel, taken in compiled.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
