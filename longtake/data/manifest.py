"""Manifests: the list of samples of a data set, as CSV, JSONL or Parquet.

Columns: `path` (required), `caption`, `label` (integer class), `start`, `end` (seconds), and what
is known of the file: `num_frames`, `height`, `width`, `fps`, `duration` (seconds). Names are taken
as they are; other columns are ignored and named in `Manifest.ignored_columns`. An empty cell, null
or a missing key means "not given".
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longtake.data.files import MediaError, locate, name_problem, open_regular

TEXT_COLUMNS = ("path", "caption")
INTEGER_COLUMNS = ("label", "num_frames", "height", "width")
SECONDS_COLUMNS = ("start", "end", "duration", "fps")
COLUMNS = frozenset(TEXT_COLUMNS + INTEGER_COLUMNS + SECONDS_COLUMNS)
NO_LABEL = -1

_MAX_LINE_BYTES = 1 << 20
_MAX_TEXT_CHARACTERS = 100_000
_MAX_SECONDS = 1e7
_MAX_INTEGER = 2**31 - 1


class ManifestError(ValueError):
    """A manifest that cannot be read; the text names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Sample:
    """One row: a clip range of a file (or an image) with what the model is told about it."""

    path: str
    """As written in the manifest."""
    caption: str
    label: int
    """NO_LABEL if there is none."""
    start: float
    end: float | None
    line: int


class TextTable(Sequence[str]):
    """Many strings in one buffer: less memory than a list, and workers share it untouched."""

    def __init__(self) -> None:
        self._bytes: bytearray | np.ndarray = bytearray()
        self._ends: array[int] | np.ndarray = array("q")

    @classmethod
    def from_columns(cls, data: np.ndarray, ends: np.ndarray) -> TextTable:
        """The inverse of `columns`, without a copy; nothing can be appended."""
        table = cls()
        table._bytes, table._ends = data, ends
        return table

    def append(self, text: str) -> None:
        assert isinstance(self._bytes, bytearray), "a table of given columns cannot grow"
        assert isinstance(self._ends, array)
        self._bytes += text.encode()
        self._ends.append(len(self._bytes))

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """All bytes (uint8), and where each text ends in them (int64)."""
        return np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = self._ends[index - 1] if index else 0
        # Given columns may hold anything.
        return bytes(self._bytes[begin : self._ends[index]]).decode(errors="replace")


@dataclass(frozen=True)
class Manifest:
    """All samples, by column. Numbers not given are -1 (integers) or nan (seconds, fps)."""

    file: Path
    root: Path
    allow_outside_root: bool
    texts: Mapping[str, Sequence[str]]
    integers: Mapping[str, np.ndarray]  # int64 (samples,)
    seconds: Mapping[str, np.ndarray]  # float64 (samples,)
    lines: np.ndarray  # int64 (samples,)
    ignored_columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        start, end = float(self.seconds["start"][index]), float(self.seconds["end"][index])
        return Sample(
            path=self.texts["path"][index],
            caption=self.texts["caption"][index],
            label=int(self.integers["label"][index]),
            start=0.0 if math.isnan(start) else start,
            end=None if math.isnan(end) else end,
            line=int(self.lines[index]),
        )

    def real_path(self, sample: Sample) -> Path:
        """Where the sample's file is.

        Raises:
            MediaError: it lies outside the root.
        """
        return locate(self.root, sample.path, allow_outside_root=self.allow_outside_root)


def read_manifest(
    path: str | Path, *, root: str | Path | None = None, allow_outside_root: bool = False
) -> Manifest:
    """Reads and checks a manifest; the media files themselves are not touched.

    Args:
        root: folder that the samples' paths are relative to; None is the manifest's own folder.
        allow_outside_root: accept absolute paths, `..` and symbolic links that leave the root.

    Raises:
        ManifestError: the format is unknown, or a line is wrong.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir():
        raise ManifestError(
            f"{file} is a folder: give a manifest. A latent store is read by `longtake train`, "
            "and checked by `longtake encode --verify`"
        )
    if reader is None:
        known = ", ".join(_READERS)
        raise ManifestError(f"{file}: the manifest's name must end in one of {known}")
    texts = {name: TextTable() for name in TEXT_COLUMNS}
    integers = {name: array("q") for name in INTEGER_COLUMNS}
    seconds = {name: array("d") for name in SECONDS_COLUMNS}
    lines = array("q")
    ignored: dict[str, None] = {}
    line = 0
    try:
        with open_regular(file) as opened:
            for line, row in reader(opened):
                for name, table in texts.items():
                    table.append(_text(name, row.get(name)))
                problem = name_problem(texts["path"][-1], allow_outside_root=allow_outside_root)
                if problem is not None:
                    raise ValueError(problem)
                for name, numbers in integers.items():
                    value = row.get(name)
                    numbers.append(-1 if value is None else _integer(name, value))
                for name, times in seconds.items():
                    value = row.get(name)
                    times.append(math.nan if value is None else _number(name, value))
                if seconds["end"][-1] <= max(0.0, seconds["start"][-1]):
                    begin, end = seconds["start"][-1], seconds["end"][-1]
                    raise ValueError(f"end={end:g} is not after start={begin:g} (seconds)")
                lines.append(line)
                for name in row:
                    if name not in COLUMNS:
                        ignored[name] = None
    except MediaError as error:
        raise ManifestError(f"manifest {error}") from error
    except _LineError as error:
        raise ManifestError(f"{file}, {error}") from error
    except ValueError as error:
        raise ManifestError(f"{file}, line {line}: {error}") from error
    if not lines:
        raise ManifestError(f"{file}: no samples: every line is empty or a header")
    return Manifest(
        file=file,
        root=Path(root) if root is not None else file.parent,
        allow_outside_root=allow_outside_root,
        texts=texts,
        integers={name: np.frombuffer(values, np.int64) for name, values in integers.items()},
        seconds={name: np.frombuffer(values, np.float64) for name, values in seconds.items()},
        lines=np.frombuffer(lines, np.int64),
        ignored_columns=tuple(ignored),
    )


class _LineError(ValueError):
    """An error that knows its own line."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"line {line}: {text}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """(line number, text) of a UTF-8 file; byte-order mark dropped, length bounded."""
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > _MAX_LINE_BYTES:
            raise _LineError(number, f"longer than {_MAX_LINE_BYTES} bytes")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            raise _LineError(number, f"not UTF-8 text ({error})") from error


def _read_csv(file: BinaryIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, text in _lines(file):  # noqa: B007 (read below)
            yield text

    rows = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [cell.strip() for cell in row]
                _check_header(header)
                continue
            if len(row) != len(header):
                text = f"{len(row)} cells where the header has {len(header)}"
                raise _LineError(number, f"{text}: quote cells that contain commas")
            yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _LineError(number, f"not valid CSV ({error})") from error


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, text in _lines(file):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _LineError(number, f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise _LineError(number, f"a JSON {type(row).__name__} where an object was expected")
        if "path" not in row:
            raise _LineError(number, f"no key 'path', only {_short(list(row))}")
        yield number, row


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        text = "Parquet manifests need pyarrow: pip install 'longtake[train]'"
        raise _LineError(0, text) from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        header = table.schema_arrow.names
        _check_header(header)
        known = [name for name in header if name in COLUMNS]
        others = dict.fromkeys(name for name in header if name not in COLUMNS)
        for batch in table.iter_batches(batch_size=4096, columns=known):
            for row in batch.to_pylist():
                number += 1
                yield number, {**row, **others}
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise _LineError(number + 1, f"not a valid Parquet file ({reason})") from error


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _check_header(header: list[str]) -> None:
    if "path" not in header:
        raise _LineError(
            1, f"no column 'path', only {_short(header)}; known: {', '.join(sorted(COLUMNS))}"
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise _LineError(1, f"column {repeated[0]!r} appears more than once")


def _short(names: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:12]) or "nothing"


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r:.80} is not text")
    if len(value) > _MAX_TEXT_CHARACTERS:
        raise ValueError(f"{name} has {len(value)} characters, more than {_MAX_TEXT_CHARACTERS}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate, which is not valid text") from error
    return value


def _number(name: str, value: object) -> float:
    """A finite number of at least 0; nan if not given."""
    if isinstance(value, str) and not value.strip():
        return math.nan
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r:.80} is not a number") from None
    if math.isnan(number) and isinstance(value, float):
        return math.nan  # how Parquet writers often say "not given"
    if not 0 <= number <= _MAX_SECONDS:
        raise ValueError(f"{name}={value!r:.80} must lie between 0 and {_MAX_SECONDS:g}")
    if number == 0 and name in ("duration", "fps"):
        raise ValueError(f"{name}=0 must be above 0; leave it empty if it is not known")
    return number


def _integer(name: str, value: object) -> int:
    """A non-negative integer; -1 if not given."""
    number = value
    if isinstance(value, str):
        if not value.strip():
            return -1
        try:
            number = int(value)
        except ValueError:
            hint = ": number the classes 0, 1, 2, ..." if name == "label" else ""
            raise ValueError(f"{name}={value!r:.80} is not an integer{hint}") from None
    elif isinstance(value, float) and math.isnan(value):
        return -1
    elif isinstance(value, float) and value.is_integer():
        number = int(value)  # a nullable integer column that became floating point
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name}={value!r:.80} is not an integer")
    if not 0 <= number <= _MAX_INTEGER:
        raise ValueError(f"{name}={value!r:.80} must lie between 0 and {_MAX_INTEGER}")
    return number
