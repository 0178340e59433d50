"""How the command line reads words and speaks of them: what flags take, mistakes in one line, errors in flags' names.

The library names its arguments, in backticks where a remedy is one of them: "choose another `out`". Here, and nowhere
else, these become flags: "choose another --out".
"""

import contextlib
import io
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args

from tyro.conf import UseAppendAction
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo
from tyro.extras import SubcommandApp

from moe.errors import ConfigError
from moe.io.toml import did_you_mean, shortened, shown

LARGEST = 2**63 - 1  # of a whole number: what sizes and counts are stored in
# Arguments of the library whose flags have other names, where a command has no flag of the same name.
FLAGS = {
    "run_dir": "out", "resume='never'": "fresh", "start_from": "from", "expert_imbalance": "imbalance",
    "n_experts": "experts", "n_kv_heads": "kv_heads", "tokens": "batch", "batches": "batch", "contexts": "context",
    "lifetime_tokens": "lifetime",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what flags take


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:  # also for more than 4,300 digits
        value = None
    if value is None or abs(value) > LARGEST:
        limit = "" if value is None else f" of at most {LARGEST:,}"
        raise ValueError(f"{shown(text)}: must be a whole number{limit}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)}: must be a number, such as 0.5 or 3e-4")
    return value


def _kind(metavar: str, kind: type, read: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        1, metavar, lambda words: read(words[0]), lambda x: isinstance(x, kind), lambda x: [str(x)]
    )


_KINDS = {
    int: _kind("N", int, _whole),
    float: _kind("NUMBER", int | float, _number),  # type: ignore[arg-type]
    str: _kind("TEXT", str, str),
    Path: _kind("PATH", Path, Path),
}


def _simple(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    return _KINDS.get(info.type)


def _optional(info: PrimitiveTypeInfo) -> Any:
    """`T | None` reads as T: what is not given is None, and there is no word for it."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return replace(
        spec, is_instance=lambda x: x is None or spec.is_instance(x),
        str_from_instance=lambda x: ["none"] if x is None else spec.str_from_instance(x),
    )  # fmt: skip


def _several(info: PrimitiveTypeInfo) -> Any:
    """`tuple[T, ...]`: any number of words."""
    kinds = get_args(info.type)
    if (
        info.type_origin is not tuple
        or kinds[1:] != (...,)
        or kinds[0] not in _KINDS
        or UseAppendAction in info.markers
    ):
        return None
    one = _KINDS[kinds[0]]
    return PrimitiveConstructorSpec(
        "*", f"{one.metavar} ...", lambda words: tuple(one.instance_from_str([word]) for word in _any(words)),
        lambda x: isinstance(x, tuple), lambda x: [str(part) for part in x] or ["none"],
    )  # fmt: skip


def _any(words: list[str]) -> list[str]:
    if not words:
        raise ValueError(": a value must follow it")
    return words


readable = ConstructorRegistry()
for rule in (_simple, _optional, _several):
    readable.primitive_rule(rule)


# ------------------------------------------------------------------------------------------------------ mistaken words


def commands(app: SubcommandApp, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command as its words: ("train",), ("data", "prepare"), ..."""
    for name, spec in app._subcommands.items():
        if isinstance(spec.target, SubcommandApp):
            yield from commands(spec.target, (*path, name))
        else:
            yield (*path, name)


def command_of(app: SubcommandApp, words: Sequence[str]) -> tuple[str, ...]:
    """The words that name the command; of a group, or of none, where help is asked for.

    Raises:
        ConfigError: there is no such command, or none is given.
    """
    path: tuple[str, ...] = ()
    while True:
        names = list(app._subcommands)
        word = words[len(path)] if len(words) > len(path) else ""
        if word.startswith("-"):
            return path
        if word not in names:
            called = f"{' '.join(('moe', *path))}"
            near = did_you_mean(word, [*names, "--version", "--help"])
            wrong = f"there is no command {shortened(f'{called} {word}')!r}{near}"
            missing = f"{called}: a command is missing"
            raise ConfigError(f"{wrong if word else missing}; there are: {', '.join(names)}")
        path = (*path, word)
        target = app._subcommands[word].target
        if not isinstance(target, SubcommandApp):
            return path
        app = target


def flags_of(run: Callable[..., Any], path: tuple[str, ...]) -> list[str]:
    """The flags of a command, as its help page has them."""
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        run(args=[*path, "--help"])
    return re.findall(r"^\W*?(?:-h, )?(--[a-z][\w-]*)", page.getvalue(), re.MULTILINE)


def show_page(run: Callable[..., Any], args: Sequence[str]) -> int:
    """Prints a help page with what stands outside of its boxes wrapped, too."""
    page = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # in which boxes are drawn, as on stdout
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        run(args=args)
    page.seek(0)
    width = shutil.get_terminal_size().columns
    for line in page.read().splitlines():
        outside = len(line) > width and line[0].isalpha()
        print(textwrap.fill(line, width, break_on_hyphens=False, subsequent_indent="  ") if outside else line)
    return 0


def complaint(event: Any, path: tuple[str, ...], flags: list[str], words: Sequence[str] = ()) -> str:
    """What tyro found wrong with the words of a command, in one line; "" for what is not known here."""
    kind, command = type(event).__name__, " ".join(("moe", *path))
    unknown = list(getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", ()))
    if kind == "MissingArgs" or (kind == "BadValue" and event.argument.is_positional()):
        # what is missing was perhaps given to a mistyped flag
        unknown = [w for w in words if w.startswith("--") and w.partition("=")[0] not in (*flags, "--help")]
    if unknown:
        flag = next((token for token in unknown if token.startswith("--")), unknown[0])
        name = flag.partition("=")[0]
        near = did_you_mean(name, flags) if name.startswith("-") else ""
        return f"{command} does not take {shortened(flag)!r}{near}; see {command} --help"
    if kind == "MissingArgs":
        missing = [_called(found.arg) for found in event.missing_arguments]
        said: Any = event.missing_arguments[0].arg.field.helptext
        said = said() if callable(said) else said
        why = f" ({said.rstrip('.')})" if said and len(missing) == 1 else ""
        return f"{command}: {' and '.join(missing)} must be given{why}; see {command} --help"
    if kind == "InvalidChoice":
        near = did_you_mean(event.value, list(event.choices))
        return (
            f"{_called(event.argument)} = {shortened(event.value)!r}: must be one of {', '.join(event.choices)}{near}"
        )
    if kind == "BadValue":
        return f"{_called(event.argument)}: a value must follow it ({event.argument.lowered.metavar})"
    if kind == "InstantiationFailure" and event.argument is not None:
        said = " ".join(str(event.message).split())
        return f"{_called(event.argument)}{'' if said.startswith(':') else ' = '}{said}"
    return ""


def _called(argument: Any) -> str:
    return str(argument.lowered.metavar) if argument.is_positional() else argument.lowered.name_or_flags[-1]


@contextlib.contextmanager
def one_line(run: Callable[..., Any], path: tuple[str, ...], words: Sequence[str]) -> Iterator[None]:
    """Within it, what tyro would print as a box of many lines is a ConfigError."""
    try:
        # Not of tyro's public interface: where a release has it no more, its own boxes come back, and nothing else.
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return

    def hook(event: Any) -> None:
        said = complaint(event, path, flags_of(run, path), words)
        if said:
            raise ConfigError(said)

    with on_parse_error(hook):
        yield


# --------------------------------------------------------------------------------------------------- errors' own words


def in_flags(message: str, flags: Sequence[str]) -> str:
    """A message of the library in the words of a command with these flags.

    An argument in backticks, with or without a value, becomes its flag, and so does that which a message begins with:
    "top_p = 2: ..." is "--top-p = 2: ...". Names that are no flags stay.
    """

    def flag(name: str, value: str = "") -> str | None:
        names = (name, FLAGS.get(name + value), FLAGS.get(name))
        return next((f for n in names if n and (f := f"--{n.replace('_', '-')}") in flags), None)

    def in_backticks(match: re.Match[str]) -> str:
        found = flag(match[1], match[2] or "")
        given = "" if f"{match[1]}{match[2]}" in FLAGS else (match[2] or "").replace("=", " ", 1)
        return f"{found}{given}" if found else match[0]

    begin = re.match(r"([a-z]\w*)(?= = )", message)
    if begin and (found := flag(begin[1])):
        message = found + message[begin.end() :]
    return re.sub(r"`([a-z]\w*)(=[^`]*)?`", in_backticks, message)


def speaking(reporter: Any, *flags: str) -> Any:
    """A reporter of training whose notes are in the words of a command with these flags."""
    note = reporter.note
    reporter.note = lambda text: note(in_flags(text, flags))
    return reporter
