"""YAML files and overrides -> frozen dataclasses, checked against the dataclasses' own annotations.

A field is an int, float, bool, str, Literal, tuple[X, ...], dict[str, X], dict[str, Any], another such dataclass (a
section), a dict[str, section], or any of these `| None`. Every refusal is a ConfigError that says where the value was
written, the key's full path, what is wrong, and what to write instead.
"""

import copy
import dataclasses
import difflib
import json
import operator
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlm_dist.yaml_tree import ConfigError, Value, dump, plain_tree, read_tree

__all__ = ["ConfigError", "flatten", "from_mapping", "help_text", "load", "setting", "to_mapping", "to_yaml"]

Config = TypeVar("Config")
Bounds = Mapping[str, float]  # {"at least": 0.0, "below": 1.0}

_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def setting(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    help: str = "",
) -> Any:
    """A dataclass field with a range and a line of help. Without a default the key is required.

    `low` and `high` are inclusive, `above` and `below` exclusive; in a list or mapping they hold for every number.
    They are checked by `load` and `from_mapping`, not by the dataclass itself.
    """
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    metadata = {"bounds": {word: limit for word, limit in limits.items() if limit is not None}, "help": help}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---- what a dataclass says about its fields


def _key(field: dataclasses.Field) -> str:
    return field.name.removesuffix("_")  # `from_` is the key `from`


def _default(field: dataclasses.Field, base: Any) -> Any:
    """The value of a key that is not given: that of the section's own default instance `base`, if it has one."""
    if base is not None:
        return getattr(base, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _split_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); X -> (X, False)."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    kinds = [k for k in typing.get_args(kind) if k is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"a field's type may be X or X | None, not {kind}")
    return kinds[0], True


def _fields(cls: type, base: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, Any, Mapping]]:
    """(dotted key, type, default, metadata) of every key, sections entered; NAME stands for the keys of a mapping."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default, path = kinds[field.name], _default(field, base), prefix + _key(field)
        inner, optional = _split_optional(kind)
        if optional or not dataclasses.is_dataclass(inner):
            yield path, kind, default, field.metadata
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, default if dataclasses.is_dataclass(default) else None, f"{path}.")
        elif (section := _section_of(inner)) is not None:
            yield from _fields(section, None, f"{path}.NAME.")


def _section_of(kind: Any) -> type | None:
    """The section that a mapping's values are: dict[str, section] -> section; anything else -> None."""
    args = typing.get_args(kind)
    return args[1] if typing.get_origin(kind) is dict and dataclasses.is_dataclass(args[1]) else None


# ---- the words of an error


def _expected(kind: Any, bounds: Bounds) -> str:
    """`kind` in words."""
    inner, optional = _split_optional(kind)
    origin = typing.get_origin(inner)
    if dataclasses.is_dataclass(inner):
        words = f"a section with keys among {', '.join(map(_key, dataclasses.fields(inner)))}"
    elif origin is Literal:
        words = f"one of {', '.join(map(_option, typing.get_args(inner)))}"
    elif origin in (tuple, dict):
        words = "a list" if origin is tuple else f"a mapping{' of sections' if _section_of(inner) else ''}"
    else:
        words = _NAMES[inner]
    limits = f" {_limits(bounds)}" if inner in (int, float) and bounds else ""
    return words + limits + (" or null" if optional else "")


def _option(value: Any) -> str:
    """A value of a Literal as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(bounds: Bounds) -> str:
    return f"({' and '.join(f'{word} {limit}' for word, limit in bounds.items())})"


def _hint(kind: Any, value: Value) -> str:
    """How to write what was probably meant."""
    inner, _ = _split_optional(kind)
    if value.data is None or isinstance(value.data, list | dict):
        return ""
    if typing.get_origin(inner) is Literal:
        close = difflib.get_close_matches(_option(value.data), map(_option, typing.get_args(inner)), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if typing.get_origin(inner) is tuple:
        return f"; write [{value.data if value.text is None else value.text}]"
    if inner in (int, float) and isinstance(value.data, str):
        return "; write a plain number such as " + ("1000, 1_000 or 1e3" if inner is int else "0.001 or 1e-3")
    return "; put it in quotes" if inner is str else ""


# ---- tree -> dataclasses


def _number(kind: type, value: Value) -> int | float | None:
    """The value as an int or float, or None if it is not one: 12.0 is no int, but 1e9 is, as a way to write it."""
    data = value.data
    if type(data) not in (int, float) or not abs(data) <= sys.float_info.max:
        return None
    if kind is float or type(data) is int:
        return kind(data)
    exact = Decimal(value.text) if value.text is not None and "e" in value.text.lower() else None
    return int(exact) if exact is not None and exact == exact.to_integral_value() else None


class _Checker:
    """Turns a tree into a `root`; `source` is named where the trouble is that something was not written at all."""

    def __init__(self, root: type, source: str) -> None:
        self.root, self.source = root, source

    def section(self, cls: type, value: Value, path: str, base: Any = None) -> Any:
        fields = {_key(field): field for field in dataclasses.fields(cls)}
        dotted = f"{path}." if path else ""
        for key, given in value.data.items():
            if key not in fields:
                raise ConfigError(f"{given.origin}: {dotted}{key} is no setting; {self.suggest(dotted, key, fields)}")
        kinds = typing.get_type_hints(cls)
        arguments = {}
        for key, field in fields.items():
            given, default = value.data.get(key), _default(field, base)
            arguments[field.name] = self.field(field, kinds[field.name], given, default, dotted + key)
        try:
            return cls(**arguments)
        except ConfigError as error:
            raise ConfigError(f"{value.origin}: {path + ': ' if path else ''}{error}") from error

    def field(self, field: dataclasses.Field, kind: Any, given: Value | None, default: Any, path: str) -> Any:
        inner, optional = _split_optional(kind)
        is_section = dataclasses.is_dataclass(inner)
        bounds = field.metadata.get("bounds", {})
        # A section with all its lines commented out is as good as not written.
        absent = given is None or (given.blank and (is_section or typing.get_origin(inner) is dict))
        if absent and default is not MISSING:
            return default
        if absent and is_section and not optional:
            given = Value({}, self.source)
        if given is None:
            raise ConfigError(f"{self.source}: {path} is missing; it must be {_expected(kind, bounds)}")
        return self.read(kind, given, path, bounds, default if dataclasses.is_dataclass(default) else None)

    def read(self, kind: Any, value: Value, path: str, bounds: Bounds, base: Any = None) -> Any:
        inner, optional = _split_optional(kind)
        origin, data = typing.get_origin(inner), value.data
        if optional and data is None:
            return None
        if inner is Any:
            return self.anything(value, path)
        if dataclasses.is_dataclass(inner) and isinstance(data, dict):
            return self.section(inner, value, path, base)
        if origin is tuple and isinstance(data, list):
            item = typing.get_args(inner)[0]
            return tuple(self.read(item, each, f"{path}[{i}]", bounds) for i, each in enumerate(data))
        if origin is dict and isinstance(data, dict):
            item = typing.get_args(inner)[1]
            if dataclasses.is_dataclass(item):  # a section that says null is one of a parent's to leave out
                data = {key: each for key, each in data.items() if each.data is not None or each.blank}
            return {key: self.read(item, each, f"{path}.{key}", bounds) for key, each in data.items()}
        if origin is Literal and any(
            type(option) is type(data) and option == data for option in typing.get_args(inner)
        ):
            return data
        if inner in (bool, str) and type(data) is inner:
            return data
        if inner in (int, float):
            number = _number(inner, value)
            if number is not None and all(_HOLDS[word](number, limit) for word, limit in bounds.items()):
                return number
        raise ConfigError(f"{value.origin}: {path} must be {_expected(kind, bounds)}, got {value}{_hint(kind, value)}")

    def anything(self, value: Value, path: str) -> Any:
        if isinstance(value.data, dict):
            return {key: self.anything(each, f"{path}.{key}") for key, each in value.data.items()}
        if isinstance(value.data, list):
            return [self.anything(each, f"{path}[{i}]") for i, each in enumerate(value.data)]
        return self.read(float, value, path, {}) if isinstance(value.data, float) else value.data

    def suggest(self, dotted: str, key: str, names: Mapping[str, Any]) -> str:
        if "." in key:
            return "dots are for overrides: in a file, write each part as a section of its own"
        close = difflib.get_close_matches(key, names, n=1)
        elsewhere = [path for path, *_ in _fields(self.root) if path.split(".")[-1] == key]
        if found := [dotted + name for name in close] + elsewhere[:2]:
            return f"did you mean {' or '.join(found)}?"
        return f"{dotted.removesuffix('.') or 'the top level'} has {', '.join(names)}"


# ---- in and out


def load(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The `cls` that a YAML file, the chain of its `extends:` parents and `section.key=value` overrides describe.

    A parent's path is relative to the file that names it. A child stands over its parent and the overrides over both:
    mappings merge key by key, lists and all else replace. Raises ConfigError at the first thing that cannot stand.
    """
    return _Checker(cls, str(path)).section(cls, read_tree(path, overrides), "")


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], source: str = "mapping") -> Config:
    """The `cls` that plain data describe, as strictly as `load`; `source` is what errors call it."""
    return _Checker(cls, source).section(cls, plain_tree(mapping, source), "")


def to_mapping(cfg: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and scalars, every key present: what `from_mapping` takes."""
    return {_key(field): _plain(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(cfg: Any) -> str:
    """A config as YAML, every key present: what `load` takes."""
    return dump(to_mapping(cfg))


def flatten(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{rest}": item for rest, item in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def _type_name(kind: Any) -> str:
    inner, optional = _split_optional(kind)
    args = typing.get_args(inner)
    if typing.get_origin(inner) is Literal:
        name = " | ".join(map(_option, args))
    elif typing.get_origin(inner) is tuple:
        name = f"list of {_type_name(args[0])}"
    elif typing.get_origin(inner) is dict:
        name = "mapping" if args[1] is Any else f"mapping of {_type_name(args[1])}"
    else:
        name = "section" if dataclasses.is_dataclass(inner) else inner.__name__
    return f"{name} | null" if optional else name


def help_text(cls: type) -> str:
    """One line per dotted key: its type, range, default and help."""
    rows = list(_fields(cls))
    width = max(len(path) for path, *_ in rows)
    lines = []
    for path, kind, default, metadata in rows:
        limits = f" {_limits(metadata['bounds'])}" if metadata.get("bounds") else ""
        shown = ", required" if default is MISSING else f" = {json.dumps(_plain(default), ensure_ascii=False)}"
        note = f"  # {metadata['help']}" if metadata.get("help") else ""
        lines.append(f"{path:<{width}}  {_type_name(kind)}{limits}{shown}{note}")
    return "\n".join(lines)
