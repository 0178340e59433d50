"""What each key of a configuration is: its type, default and meaning, read from the dataclasses themselves.

The meaning is the comment beside a field, or on the line above it. `moe configs --keys` and docs/configuration.md show
the same.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from moe.io.toml import section_of, toml_value


@dataclasses.dataclass(frozen=True)
class Key:
    """One key, under its name with its sections, such as "attention.rope.theta"."""

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass of settings: its name ("" for the root), what it says of itself, its own keys."""

    name: str
    about: str
    keys: tuple[Key, ...]


def sections(kind: Any, prefix: str = "") -> Iterator[Section]:
    """A dataclass of a configuration and the sections in it, in their order.

    Raises:
        ValueError: a field has no comment.
    """
    hints, keys, below = typing.get_type_hints(kind), [], []
    meanings = _meanings(kind, hints)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if section := section_of(hint):
            below += sections(section, f"{prefix}{field.name}.")
        else:
            keys.append(Key(prefix + field.name, _type_text(hint), _default(field), meanings[field.name]))
    yield Section(prefix.rstrip("."), " ".join((kind.__doc__ or "").split()), tuple(keys))
    yield from below


def _meanings(kind: Any, hints: dict[str, Any]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (found,) = ast.parse(source).body
    assert isinstance(found, ast.ClassDef)
    meanings = {}
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        name = node.target.id
        if section_of(hints[name]):
            continue
        beside = lines[node.lineno - 1][node.end_col_offset or 0 :].strip()
        comment = beside or lines[node.lineno - 2].strip()
        if not comment.startswith("# "):
            raise ValueError(f"{kind.__qualname__}.{name} has no comment that says what it means")
        meanings[name] = comment.removeprefix("# ")
    return meanings


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(toml_value, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("number" if part is int else _type_text(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return "table of whole numbers"
    names = {int: "whole number", float: "number", str: "string", bool: "true or false"}
    return names.get(hint) or f"list of {len(typing.get_args(hint))} numbers"


def _default(field: Any) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "has to be given"  # of a section that is absent by default
    return toml_value(field.default_factory() if field.default is dataclasses.MISSING else field.default)
