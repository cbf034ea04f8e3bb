"""Run configurations as YAML, strictly: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import yaml
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)

_Config = TypeVar("_Config")


class _UniqueKeys(yaml.SafeLoader):
    """YAML, except that a key given twice is a mistake, not a change of mind."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (place, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", place.start_mark
                )
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path, kind: type[_Config]) -> _Config:
    """Read a configuration file into its dataclass; keys left out keep their defaults.

    Raises: ValueError with one line per mistake, each with its place in the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise ValueError(f"config file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(
            f"config file {path} must be a mapping of keys, got {type(values).__name__}"
        )
    return from_plain(values, kind, source=str(path))


def dump_yaml(config: Any) -> str:
    """A configuration as YAML text, every key written out."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts, lists and scalars."""
    return _tuples_to_lists(dataclasses.asdict(config))


def from_plain(values: dict[str, Any], kind: type[_Config], *, source: str) -> _Config:
    """The inverse of `to_plain`.

    Raises: ValueError with one line per mistake; `source` says where the values came from.
    """
    converter = cattrs.Converter(forbid_extra_keys=True)
    for scalar in (int, float, str, bool):
        converter.register_structure_hook(scalar, _structure_scalar)
    converter.register_structure_hook_func(
        lambda kind: get_origin(kind) is Literal, _structure_choice
    )
    try:
        return converter.structure(values, kind)
    except ClassValidationError as error:
        raise ValueError("\n".join(f"{source}: {line}" for line in _mistakes(error, ""))) from None


def _structure_scalar(value: Any, kind: type) -> Any:
    # cattrs would turn "5" into 5 and 2.7 into 2; a wrong type is a mistake to report.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        with suppress(ValueError):
            return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _structure_choice(value: Any, kind: Any) -> Any:
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, choices))}")
    return value


def _mistakes(error: BaseException, place: str) -> list[str]:
    """One line per leaf of cattrs' error tree."""
    if isinstance(error, (ClassValidationError, IterableValidationError)):
        lines = []
        for child in error.exceptions:
            lines += _mistakes(child, place + _step(child))
        return lines
    if isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        return [_unknown_key(place, key, known) for key in sorted(error.extra_fields)]
    text = str(error)
    if "is not iterable" in text:
        # cattrs looks inside a value without asking whether it is a mapping or a list.
        text = "expected keys below it, or a list of entries"
    return [f"{place.lstrip('.') or 'top level'}: {text}"]


def _step(error: BaseException) -> str:
    """How an error's note extends the place: `.key` or `[index]`."""
    for note in getattr(error, "__notes__", []):
        if isinstance(note, AttributeValidationNote):
            return f".{note.name}"
        if isinstance(note, IterableValidationNote):
            return f"[{note.index}]" if isinstance(note.index, int) else ""
    return ""


def _unknown_key(place: str, key: str, known: list[str]) -> str:
    full = f"{place}.{key}".lstrip(".")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {full}: {hint}"


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tuples_to_lists(item) for item in value]
    return value
