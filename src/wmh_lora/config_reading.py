"""Strict reading of settings: dataclasses from plain values, and back.

Settings travel as TOML files (written by people) and as JSON inside model files (written by
`wmh_lora.models.model_file`). Both pass through `from_dict`, which refuses unknown keys and wrong
types: a misspelt option must not silently become its default.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from wmh_lora.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no TOML reader of its own
    import tomli as tomllib

__all__ = ["from_dict", "read_toml", "require", "to_dict"]

ConfigT = TypeVar("ConfigT")


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"Setting {name!r} must be {expected}, found {found!r}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain JSON/TOML values (tuples as lists, paths as text).

    Examples
    --------
    >>> from wmh_lora.config import InferenceConfig
    >>> to_dict(InferenceConfig(threshold=0.6))["threshold"]
    0.6
    """
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    """One value of `to_dict`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any]) -> ConfigT:
    """Build the settings dataclass ``cls`` from plain values.

    Nested dataclasses are built from nested mappings, tuples from lists, floats also from
    integers and paths from text. Keys that are absent take their default.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are bool, int, float, str, Path, Literal, tuples and string-keyed
        mappings of these, other such dataclasses, or optional.
    mapping : Mapping
        Plain values by field name.

    Returns
    -------
    An instance of ``cls``.

    Raises
    ------
    ConfigError
        On an unknown or missing key, or a value of the wrong type or range; the message lists all
        that is wrong, nested tables included.

    Examples
    --------
    >>> from wmh_lora.config import InferenceConfig
    >>> from_dict(InferenceConfig, {"threshold": 0.6, "tta": "flip"}).tta
    'flip'
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{cls.__name__} is read from a table of settings, found {mapping!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    problems = [_unknown(name, fields, cls.__name__) for name in mapping if name not in fields]
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(mapping)):
        problems.append(f"Setting {', '.join(map(repr, missing))} of {cls.__name__} is missing.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in mapping:
        if name in fields:
            try:
                values[name] = _parse(hints[name], mapping[name], name)
            except ConfigError as error:
                problems.append(str(error))
    if required <= values.keys():  # ranges are looked at even where another value is wrong
        try:
            config = cls(**values)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _unknown(name: str, fields: Mapping[str, Any], owner: str) -> str:
    """Say that a key is unknown, and what may have been meant."""
    close = difflib.get_close_matches(str(name), fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(fields))}."
    return f"Unknown setting {name!r} for {owner}; {hint}"


def _parse(hint: Any, value: Any, name: str) -> Any:
    """Check ``value`` against the type ``hint`` of the field ``name`` and convert it."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _parse_union(typing.get_args(hint), value, name)
    if origin is Literal:
        options = typing.get_args(hint)
        require(value in options, name, f"one of {', '.join(map(str, options))}", value)
        return value
    if origin is tuple:
        return _parse_tuple(typing.get_args(hint), value, name)
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), name, "a table", value)
        item_hint = typing.get_args(hint)[1]
        return {str(k): _parse(item_hint, item, f"{name}.{k}") for k, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value)
    return _parse_scalar(hint, value, name)


def _parse_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    """Take the first member of a union that accepts ``value``."""
    if value is None and type(None) in options:
        return None
    *first, last = (option for option in options if option is not type(None))
    for option in first:
        try:
            return _parse(option, value, name)
        except ConfigError:
            continue
    return _parse(last, value, name)


def _parse_tuple(item_hints: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    """Read a list as a tuple, of any length (``tuple[X, ...]``) or of a fixed one."""
    require(isinstance(value, (list, tuple)), name, "a list", value)
    if len(item_hints) == 2 and item_hints[1] is Ellipsis:
        item_hints = (item_hints[0],) * len(value)
    require(len(value) == len(item_hints), name, f"a list of {len(item_hints)}", value)
    items, problems = [], []
    for i, (hint, item) in enumerate(zip(item_hints, value, strict=True)):
        try:
            items.append(_parse(hint, item, f"{name}[{i}]"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(items)


def _parse_scalar(hint: Any, value: Any, name: str) -> Any:
    """Read a bool, int, float, str or Path; booleans do not pass as numbers."""
    if hint is Path:
        require(isinstance(value, (str, Path)), name, "a path", value)
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint not in expected:
        raise TypeError(f"Field {name!r} has the type {hint!r}, which from_dict cannot read.")
    correct = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(correct, name, expected[hint], value)
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain values.

    Raises
    ------
    ConfigError
        If the file is absent, unreadable or not TOML.
    """
    try:
        with Path(path).open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot read the settings file {path}: {reason}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} is not valid TOML: {error}.") from error
