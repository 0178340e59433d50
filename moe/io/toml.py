"""Frozen dataclasses as TOML, read strictly and written whole. The standard library only.

A section is a dataclass; a section that may be absent is annotated `Section | None`. An unknown key, a wrong type or a
bad value raises `ConfigError`, which names the key, the value and the remedy. Numbers, strings, booleans, Literal
choices, tuples of fixed length and dictionaries of one type are known.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from moe.errors import ConfigError


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises ConfigError, naming the setting, its value and the rule, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} = {shown(value)}: {rule}")


def shown(value: object) -> str:
    """A value in a message: its repr, of what is long only the ends."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to write the longest
        return f"a whole number of {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Text in a message: what is longer than a line, by its ends."""
    return text if len(text) <= 120 else f"{text[:60]}...{text[-20:]} ({len(text):,} characters)"


def from_table(kind: Any, table: dict[str, Any], section: str = "", base: Any = None, root: Any = None) -> Any:
    """A dataclass from a TOML table, strictly; settings that the table lacks come from `base` or the defaults.

    Args:
        section: what stands before its keys, such as "attention.rope."; `root` is then the outermost dataclass.
    """
    root = root or kind
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = section + key
        if key not in hints:
            name, known = section + _inmost(key, value), all_keys(root)
            if isinstance(value, dict) and name == section + key:
                known = sorted({known_key.rpartition(".")[0] for known_key in known} - {""})
            raise ConfigError(f"unknown key {name!r}{did_you_mean(name, known)}")
        inner = section_of(hints[key])
        if inner is not None:
            require(isinstance(value, dict), name, value, f"is a section: write [{name}]")
            before = getattr(base, key) if base is not None else None
            values[key] = from_table(inner, value, f"{name}.", before, root)
        else:
            values[key] = _check_type(name, value, hints[key])
            if isinstance(value, dict) and base is not None:
                values[key] = getattr(base, key) | values[key]
    if base is not None:
        return dataclasses.replace(base, **values)
    for f in dataclasses.fields(kind):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{section}{f.name} is missing: the section [{section.rstrip('.')}] needs it")
    return kind(**values)


def _inmost(key: str, value: Any) -> str:
    """The one key that a table of one key, and so on inside, is about: "trian.steps" of trian = {steps = 1}."""
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value
        return f"{key}.{_inmost(inner, value[inner])}"
    return key


def section_of(hint: Any) -> Any:
    """The dataclass of a section, one that may be absent included; None for a setting."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next((part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), None)
    return hint if dataclasses.is_dataclass(hint) else None


def _check_type(name: str, value: Any, hint: Any) -> Any:
    """The value as the annotated type, or a ConfigError. bool is not an int here, and an int serves as a float."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, name, value, f"must be one of {', '.join(map(repr, choices))}")
        return value
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[1:] == (...,):
            require(isinstance(value, list | tuple), name, value, "must be a list")
            parts = parts[:1] * len(value)
        ok = isinstance(value, list | tuple) and len(value) == len(parts)
        require(ok, name, value, f"must be a list of {len(parts)} numbers")
        return tuple(_check_type(f"{name}[{i}]", v, h) for i, (v, h) in enumerate(zip(value, parts, strict=True)))
    if typing.get_origin(hint) is dict:
        require(
            isinstance(value, dict), name, value, f"is a table: write {name.rpartition('.')[2]} = {{name = number}}"
        )
        return {key: _check_type(f"{name}.{key}", v, typing.get_args(hint)[1]) for key, v in value.items()}
    if type(value) is int:
        require(abs(value) < 2**63, name, value, "must be a number below 2^63")
    if hint == int | str and type(value) in (int, str):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float:
        require(abs(value) != math.inf, name, value, "must be a finite number")
    instead = f", not {_TYPE_NAMES.get(type(value), 'this')}"
    if hint is int and type(value) is float:
        instead = ", written without a point or an exponent"
    require(type(value) is hint, name, value, f"must be {_TYPE_NAMES[hint]}{instead}")
    return value


_TYPE_NAMES: dict[Any, str] = {
    int | str: "a whole number or a string",
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a section",
    list: "a list",
}


def all_keys(kind: Any, section: str = "") -> list[str]:
    """Every key that a dataclass and its sections have, as "section.key"."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = section_of(hint)
        keys += [section + name] if inner is None else all_keys(inner, f"{section}{name}.")
    return keys


def did_you_mean(key: str, valid: list[str]) -> str:
    """The end of a message about an unknown key: the nearest that there is, if one is near."""
    leaf = key.rpartition(".")[2]
    same_leaf = [v for v in valid if v.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0) or difflib.get_close_matches(key, valid, n=1)
    if not close:
        leaves = {v.rpartition(".")[2]: v for v in valid}
        close = [leaves[m] for m in difflib.get_close_matches(leaf, list(leaves), n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_value(text: str) -> Any:
    """A value as TOML writes it; what is none is a string, such as a bare word in train.schedule=wsd."""
    try:
        return read_toml(f"value = {text}")["value"]
    except ConfigError:
        return text


def read_file(path: Path) -> dict[str, Any]:
    """The table of a TOML file. Raises ConfigError, which names the file and says why, where there is none."""
    try:
        return read_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_toml(text: str) -> dict[str, Any]:
    """A TOML table. Raises ConfigError, which says why, for text that is none, or that nobody can read."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also for a number of more than 4,300 digits
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("its brackets are nested too deeply") from None


# ---------------------------------------------------------------------------------------------------------- writing


def to_lines(value: Any, section: str = "") -> list[str]:
    """Every setting of a dataclass as lines of TOML that `from_table` reads back to an equal one."""
    lines, subsections = [], []
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if v is None:
            continue  # a section that is absent
        if dataclasses.is_dataclass(v):
            subsections += ["", f"[{section}{f.name}]", *to_lines(v, f"{section}{f.name}.")]
        else:
            lines.append(f"{f.name} = {toml_value(v)}")
    return lines + subsections


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in value)
        return f'"{escaped}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)
