"""YAML text -> a tree of values, each of which knows where it was written: a file with its parents, under overrides.

PyYAML reads `1e-4` as text, `no` as False, `12:30` as 750, `010` as 8 and keeps the last of two equal keys. Here plain
scalars follow YAML 1.2 instead, and a file is only ever data: tags, anchors and merge keys are refused.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml


class ConfigError(ValueError):
    """A setting that cannot stand. The message is one sentence for the user: where it was written, what is wrong."""


@dataclass(frozen=True)
class Value:
    """None, bool, int, float, str, list[Value] or dict[str, Value]; where it was written; how, if it is a scalar."""

    data: Any
    origin: str
    text: str | None = None

    @property
    def blank(self) -> bool:
        """`key:` with nothing after it, which is not the same as `key: null` where the key is a section."""
        return self.data is None and self.text == ""

    def __str__(self) -> str:
        if isinstance(self.data, list | dict):
            return "a list" if isinstance(self.data, list) else "a mapping"
        if isinstance(self.data, str):
            return f"the text {self.data!r}" if len(self.data) <= 80 else f"the text {self.data[:80]!r}..."
        return "nothing" if self.blank else (self.text or json.dumps(self.data))


# ---- text -> tree

_WHOLE = r"(?:0|[1-9](?:_?[0-9]){0,99})"
_RESOLVERS = [
    (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
    for tag, pattern in (
        ("null", r"null|Null|NULL|~|"),
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("int", rf"[-+]?{_WHOLE}"),
        ("float", rf"[-+]?(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    )
]
_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "tag:yaml.org,2002:str": str,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {None: _RESOLVERS}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None:
            problem = "anchors and aliases (&name, *name) are not used here; put what is shared in an `extends:` file"
        elif event.tag is not None:
            problem = f"the tag '{event.tag}' is not allowed; write a plain value"
        else:
            return super().compose_node(parent, index)
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


@dataclass(frozen=True)
class _Source:
    """A file, or an override, which is its own place: its name says all of it."""

    name: str
    is_file: bool

    def at(self, mark: Any, column: bool = False) -> str:
        place = f":{mark.line + 1}" + (f":{mark.column + 1}" if column else "")
        return self.name + place if self.is_file else self.name

    def parse(self, text: str) -> Value:
        """The tree of a YAML text; nothing at all is a blank. Raises ConfigError for syntax and repeated keys."""
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            where = self.at(error.problem_mark or error.context_mark, column=True)
            problem = ", ".join(filter(None, (error.context, error.problem)))
            tabs = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
            raise ConfigError(f"{where}: this cannot be read as YAML: {problem}{tabs}") from error
        except yaml.reader.ReaderError as error:
            line = f":{text.count(chr(10), 0, error.position) + 1}" if self.is_file else ""
            raise ConfigError(f"{self.name}{line}: the character {chr(error.character)!r} is not allowed") from error
        return Value(None, self.name, "") if node is None else self.value(node, node.start_mark, ())

    def value(self, node: yaml.Node, mark: Any, path: tuple[str, ...]) -> Value:
        origin = self.at(mark)
        if isinstance(node, yaml.ScalarNode):
            return Value(_SCALARS[node.tag](node.value), origin, node.value)
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(item, item.start_mark, path) for item in node.value], origin)
        values: dict[str, Value] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, here = self.key(key_node), key_node.start_mark
            if key in values:
                both = f", on lines {lines[key]} and {here.line + 1}" if self.is_file else ""
                raise ConfigError(f"{self.at(here)}: {'.'.join((*path, key))} is given twice{both}; keep one of them")
            values[key], lines[key] = self.value(value_node, here, (*path, key)), here.line + 1
        return Value(values, origin)

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            written = f"'{node.value}'" if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(f"{self.at(node.start_mark)}: a key must be text, got {written}; put it in quotes")
        if node.value == "<<" and node.style is None:
            problem = "merge keys (<<) are not used here; put what is shared in an `extends:` file"
            raise ConfigError(f"{self.at(node.start_mark)}: {problem}")
        return node.value


# ---- files, parents and overrides -> one tree


def _merge(under: Value, over: Value) -> Value:
    """Mappings merge key by key at every depth; anything else replaces. A blank changes nothing in a mapping."""
    if isinstance(under.data, dict) and over.blank:
        return under
    if not isinstance(under.data, dict) or not isinstance(over.data, dict):
        return over
    merged = dict(under.data)
    for key, value in over.data.items():
        merged[key] = _merge(merged[key], value) if key in merged else value
    return Value(merged, over.origin)


def _read_text(path: Path, asked_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ConfigError(f"{asked_by}there is no folder {path.parent} to find {path.name} in") from None
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
        close = difflib.get_close_matches(path.name, names, n=1)
        there = f"{path.parent} has {', '.join(names) or 'no .yaml file'}"
        hint = f"did you mean {path.parent / close[0]}?" if close else there
        raise ConfigError(f"{asked_by}there is no file {path}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"{asked_by}{path} cannot be read: {why}") from error


def _read_file(path: Path, children: tuple[Path, ...] = (), asked_by: str = "") -> Value:
    """The tree of a file, merged over that of its parent."""
    if path.resolve() in [child.resolve() for child in children]:
        circle = " -> ".join(map(str, (*children, path)))
        raise ConfigError(f"{asked_by}the files extend one another in a circle: {circle}")
    tree = _Source(str(path), is_file=True).parse(_read_text(path, asked_by))
    data = {} if tree.blank else tree.data
    if not isinstance(data, dict):
        raise ConfigError(f"{tree.origin}: a config is a mapping, made of lines such as 'key: value'; got {tree}")
    extends = data.pop("extends", None)
    if extends is None:
        return Value(data, str(path))
    if not isinstance(extends.data, str):
        raise ConfigError(f"{extends.origin}: extends must name one file, relative to this one; got {extends}")
    parent = Path(os.path.normpath(path.parent / extends.data))
    return _merge(_read_file(parent, (*children, path), f"{extends.origin}: extends: "), Value(data, str(path)))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Value:
    """The mapping that a YAML file, the chain of its `extends:` parents and `a.b=value` overrides come to.

    Raises ConfigError for files that cannot be read, YAML that cannot stand, and malformed or repeated overrides.
    """
    tree = _read_file(Path(path))
    seen: dict[str, str] = {}
    for text in overrides:
        source = _Source(f"override '{text}'", is_file=False)
        left, equals, right = text.partition("=")
        parts = [part.strip() for part in left.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"{source.name}: an override is written section.key=value")
        key = ".".join(parts)
        if key in seen:
            raise ConfigError(f"{source.name}: {key} is already set by {seen[key]}; keep one of them")
        seen[key] = source.name
        value = source.parse(right)
        for part in reversed(parts):
            value = Value({part: value}, source.name)
        tree = _merge(tree, value)
    return Value(tree.data, str(path))


# ---- plain Python data -> tree, and -> text


def plain_tree(data: Any, origin: str, path: str = "") -> Value:
    """The tree of plain Python data, which was not written in a file. Raises ConfigError for any other type."""
    if isinstance(data, Mapping):
        if odd := [key for key in data if not isinstance(key, str)]:
            raise ConfigError(f"{origin}: a key must be text, got {odd[0]!r} in {path or 'the top level'}")
        dotted = f"{path}." if path else ""
        return Value({key: plain_tree(item, origin, dotted + key) for key, item in data.items()}, origin)
    if isinstance(data, list | tuple):
        return Value([plain_tree(item, origin, f"{path}[{i}]") for i, item in enumerate(data)], origin)
    if data is None or type(data) in (bool, int, float, str):
        return Value(data, origin)
    raise ConfigError(f"{origin}: {path} holds a {type(data).__name__}, where only plain data can stand")


class _Dumper(yaml.SafeDumper):
    # Text is quoted where either the rules above or YAML 1.1's would read it as something else.
    yaml_implicit_resolvers: ClassVar = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RESOLVERS}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    breaks = any(character in text for character in "\n\x85\u2028\u2029")  # lost but for double quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, lambda dumper, x: dumper.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True))


def dump(mapping: Mapping[str, Any]) -> str:
    """YAML that `read_tree` reads back as the same data, and so does a YAML 1.1 reader such as `yaml.safe_load`."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
