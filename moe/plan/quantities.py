"""Numbers that know their unit, their interval, and where they come from.

A `Quantity` adds only what has the same dimension, carries the rounding of its inputs as an interval, and remembers
which assumptions and which unknown inputs it read. `derive` evaluates a formula and keeps it, so that `explain` prints
the very formula that was computed, with the numbers put in. Counts (layers, GPUs, experts) have no dimension; tokens,
parameters, FLOPs, bytes, seconds, dollars and words do.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from moe.errors import ConfigError
from moe.io.toml import require, shown

Dims = tuple[tuple[str, int], ...]  # base unit -> exponent, sorted, without zeros

_BASES = ("FLOP", "byte", "s", "USD", "token", "param", "word")
_NAMED: dict[str, tuple[float, str]] = {
    "bit": (1 / 8, "byte"), "B": (1, "byte"), "cent": (0.01, "USD"), "min": (60, "s"), "h": (3600, "s"),
    "day": (86_400, "s"), "year": (365 * 86_400, "s"), "ms": (1e-3, "s"), "us": (1e-6, "s"),
}  # fmt: skip
_DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class UnitError(ConfigError):
    """Two numbers of different dimension were added or compared, or a result has another unit than it should."""


@functools.cache
def _symbol(name: str) -> tuple[float, Dims]:
    """The scale and dimension of one unit symbol: a base, a named unit, or either with a prefix (GB, GiB, TFLOP)."""
    if name in ("x", "", "1"):
        return 1, ()
    if name == "%":
        return 0.01, ()
    if name in _BASES:
        return 1, ((name, 1),)
    if name in _NAMED:
        scale, base = _NAMED[name]
        return scale, ((base, 1),)
    for prefix, factor in (*_BINARY.items(), *_DECIMAL.items()):
        rest = name.removeprefix(prefix)
        if rest != name and (rest in ("FLOP", "B", "bit", "byte", "token", "param", "USD")):
            scale, dims = _symbol(rest)
            return factor * scale, dims
    raise UnitError(f"unit {name!r}: there is no such unit; use FLOP, B, bit, s, h, day, USD, cent, token, param, ...")


@functools.cache
def parse_unit(text: str) -> tuple[float, Dims]:
    """Scale and dimension of a unit such as "GB/s", "FLOP/token" or "USD/h".

    Raises:
        UnitError: no such unit.
    """
    scale: float = 1
    dims: Dims = ()
    for i, part in enumerate(text.replace(" ", "").split("/")):
        for symbol in part.split("*"):
            s, d = _symbol(symbol)
            scale = scale / s if i else scale * s
            dims = _merge(dims, d, -1 if i else 1)
    return scale, dims


def _merge(a: Dims, b: Dims, sign: int) -> Dims:
    if not b:
        return a
    powers = dict(a)
    for base, n in b:
        powers[base] = powers.get(base, 0) + sign * n
    return tuple(sorted((base, n) for base, n in powers.items() if n))


def dims_text(dims: Dims) -> str:
    """A dimension in base units, as FLOP/token."""
    above = "*".join(b if n == 1 else f"{b}^{n}" for b, n in dims if n > 0)
    below = "".join(f"/{b}" if n == -1 else f"/{b}^{-n}" for b, n in dims if n < 0)
    return (above or ("1" if below else "a plain number")) + below


@dataclass(frozen=True, slots=True, eq=False)
class Quantity:
    """A value with its interval [lo, hi], both in base units (FLOP, byte, s, USD, token, param).

    `unit` is how it is shown. `assumptions` and `unknowns` are the names of all that it read on its way, at any depth.
    """

    value: float
    dims: Dims = ()
    lo: float = math.nan
    hi: float = math.nan
    unit: str = ""
    key: str = ""
    formula: str = ""
    inputs: tuple[tuple[str, "Quantity"], ...] = ()
    note: str = ""
    assumptions: frozenset[str] = frozenset()
    unknowns: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.lo != self.lo:
            object.__setattr__(self, "lo", self.value)
            object.__setattr__(self, "hi", self.value)

    # ---------------------------------------------------------------- arithmetic

    def _with(self, other: "Quantity", value: float, bounds: tuple[float, ...], dims: Dims) -> "Quantity":
        return Quantity(
            value, dims, min(bounds), max(bounds),
            assumptions=self.assumptions | other.assumptions, unknowns=self.unknowns | other.unknowns,
        )  # fmt: skip

    def _same(self, other: "Quantity", what: str) -> None:
        if self.dims != other.dims:
            raise UnitError(f"{what}: {dims_text(self.dims)} and {dims_text(other.dims)} do not mix")

    def __add__(self, other: "Quantity | float") -> "Quantity":
        o = quantity(other)
        self._same(o, "sum")
        return self._with(o, self.value + o.value, (self.lo + o.lo, self.hi + o.hi), self.dims)

    def __sub__(self, other: "Quantity | float") -> "Quantity":
        o = quantity(other)
        self._same(o, "difference")
        return self._with(o, self.value - o.value, (self.lo - o.hi, self.hi - o.lo), self.dims)

    def __mul__(self, other: "Quantity | float") -> "Quantity":
        o = quantity(other)
        ends = tuple(_times(a, b) for a in (self.lo, self.hi) for b in (o.lo, o.hi))
        return self._with(o, _times(self.value, o.value), ends, _merge(self.dims, o.dims, 1))

    def __truediv__(self, other: "Quantity | float") -> "Quantity":
        o = quantity(other)
        if o.lo <= 0 <= o.hi and o.lo != o.hi:
            ends: tuple[float, ...] = (self.lo / o.hi, math.inf)  # a positive number whose interval reaches down to 0
        else:
            ends = tuple(_over(a, b) for a in (self.lo, self.hi) for b in (o.lo, o.hi))
        return self._with(o, _over(self.value, o.value), ends, _merge(self.dims, o.dims, -1))

    def __floordiv__(self, other: "Quantity | float") -> "Quantity":
        return floor(self / other)

    def __pow__(self, other: "Quantity | float") -> "Quantity":
        o = quantity(other)
        if o.dims or (self.dims and o.value != int(o.value)):
            raise UnitError(f"power: the exponent {dims_text(o.dims)} must be a plain, here whole, number")
        ends = tuple(a**b for a in (self.lo, self.hi) for b in (o.lo, o.hi))
        dims = tuple((base, n * int(o.value)) for base, n in self.dims)
        return self._with(o, self.value**o.value, ends, dims)

    def __radd__(self, other: float) -> "Quantity":
        return quantity(other) + self

    def __rsub__(self, other: float) -> "Quantity":
        return quantity(other) - self

    def __rmul__(self, other: float) -> "Quantity":
        return quantity(other) * self

    def __rtruediv__(self, other: float) -> "Quantity":
        return quantity(other) / self

    def __rpow__(self, other: float) -> "Quantity":
        return quantity(other) ** self

    # Comparisons are of values; those of different dimension are refused.
    def __lt__(self, other: "Quantity | float") -> bool:
        o = quantity(other)
        self._same(o, "comparison")
        return self.value < o.value

    def __le__(self, other: "Quantity | float") -> bool:
        o = quantity(other)
        self._same(o, "comparison")
        return self.value <= o.value

    def __gt__(self, other: "Quantity | float") -> bool:
        return quantity(other) < self

    def __ge__(self, other: "Quantity | float") -> bool:
        return quantity(other) <= self

    def __float__(self) -> float:
        return float(self.value)

    # ---------------------------------------------------------------- reading

    def to(self, unit: str) -> float:
        """The value in `unit`.

        Raises:
            UnitError: `unit` has another dimension.
        """
        scale, dims = parse_unit(unit)
        if dims != self.dims:
            raise UnitError(f"{self.key or 'value'}: is {dims_text(self.dims)}, not {unit}")
        return self.value if scale == 1 else self.value / scale

    @property
    def shown(self) -> float:
        """The value in its own unit."""
        return self.to(self.unit) if self.unit else self.value

    def __str__(self) -> str:
        return f"{number(self.shown)} {_unit_text(self)}".strip()

    def __repr__(self) -> str:
        """Value and key; `explain` says where it comes from."""
        return f"Quantity('{self}', key={self.key!r})" if self.key else f"Quantity('{self}')"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: value, unit, interval, formula, names of the inputs, assumptions."""
        scale = parse_unit(self.unit)[0] if self.unit else 1
        found: dict[str, Any] = {"value": _finite(self.shown), "unit": _unit_text(self)}
        if (self.lo, self.hi) != (self.value, self.value):
            found["interval"] = [_finite(self.lo / scale), _finite(self.hi / scale)]
        if self.formula:
            found["formula"] = self.formula
            found["inputs"] = {name: str(q) for name, q in self.inputs}
        if self.note:
            found["note"] = self.note
        if self.assumptions:
            found["assumes"] = sorted(self.assumptions)
        if self.unknowns:
            found["unknown"] = sorted(self.unknowns)
        return found


def _times(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b  # 0 x infinity: nothing of something unbounded


def _over(a: float, b: float) -> float:
    if b == 0:
        return math.inf if a else math.nan
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


def _finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def _unit_text(q: Quantity) -> str:
    if q.unit == "x":
        return ""
    return q.unit or (dims_text(q.dims) if q.dims else "")


def number(x: float) -> str:
    """A number for people: whole numbers whole, others with four significant digits."""
    if not math.isfinite(x):
        return str(x)
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}"
    if abs(x) >= 1e12 or 0 < abs(x) < 1e-4:
        return f"{x:.4g}"
    return f"{x:.4g}" if abs(x) < 1000 else f"{float(f'{x:.4g}') if abs(x) >= 1e5 else x:,.0f}"


# ------------------------------------------------------------------------------------------------------------ making


def quantity(x: "Quantity | float | str", unit: str = "", key: str = "", note: str = "") -> Quantity:
    """A quantity from a number in `unit`, or from text such as "40 GB"."""
    if isinstance(x, Quantity):
        return x
    if isinstance(x, str):
        try:
            return quantity(*_parsed(x), key, note)
        except UnitError as error:
            raise UnitError(f"{key or 'value'} = {shown(x)}: {error}") from None
    if not unit:
        return Quantity(x, key=key, note=note)
    scale, dims = parse_unit(unit)
    return Quantity(x * scale, dims, unit=unit, key=key, note=note)


def _parsed(text: str) -> tuple[float, str]:
    """The number and the unit of text such as "40 GB"."""
    match = re.fullmatch(r"\s*([-+0-9._eE]+)\s*(.*?)\s*", text)
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if match is None or not math.isfinite(amount):
        raise UnitError("must be a number and a unit, such as '40 GB'")
    parse_unit(match[2])
    return int(amount) if amount == int(amount) else amount, match[2]


def given(text: object, unit: str, key: str, note: str = "") -> Quantity:
    """A setting such as "40 GB", where something of the dimension of `unit` is wanted.

    Raises:
        ConfigError: not text of that form, of another dimension, or not greater than 0.
    """
    if not isinstance(text, str):
        raise ConfigError(f'{key} = {shown(text)}: must be a number with its unit, as text, such as "1 {unit}"')
    q = quantity(text, key=key, note=note)
    if q.dims != parse_unit(unit)[1]:
        raise ConfigError(f"{key} = {shown(text)}: is {dims_text(q.dims)}; it must be in {unit} or a multiple of it")
    require(q.value > 0, key, text, "must be greater than 0")
    require(1e-30 < q.value < 1e60, key, text, "is no such amount: must be from 1e-30 to 1e60 in base units")
    return q


def about(x: float, unit: str, digits: float, key: str = "", note: str = "") -> Quantity:
    """A published, rounded number: the interval is plus or minus half of `digits`, its last printed place."""
    q = quantity(x, unit, key, note)
    half = digits / 2 * parse_unit(unit)[0]
    return replace(q, lo=q.value - half, hi=q.value + half)


def assumed(q: "Quantity | float | str", name: str, unit: str = "", note: str = "") -> Quantity:
    """A value that nothing given states; all that is computed from it says so."""
    made = quantity(q, unit)
    return replace(made, key=name, note=note or made.note, assumptions=made.assumptions | {name})


def unknown(lo: float, hi: float, name: str, unit: str = "", value: float | None = None) -> Quantity:
    """An input that is not known, only its range; what is computed from it is underdetermined."""
    scale, dims = parse_unit(unit)
    middle = value if value is not None else (math.sqrt(lo * hi) if lo > 0 and hi < math.inf else max(lo, 1.0))
    return Quantity(
        middle * scale, dims, lo * scale, hi * scale, unit=unit, key=name, note="not known", unknowns=frozenset({name})
    )


def named(q: Quantity, key: str, unit: str = "", note: str = "") -> Quantity:
    """The same quantity under a key of its own."""
    if unit:
        q.to(unit)
    return replace(q, key=key, unit=unit or q.unit, note=note or q.note)


# ---------------------------------------------------------------------------------------------------------- formulas


def _spread(function: Callable[..., float]) -> Callable[..., Quantity]:
    """A function of numbers, monotonic in each argument, for quantities of one dimension."""

    def apply(*args: "Quantity | float") -> Quantity:
        qs = [quantity(a) for a in args]
        total = qs[0]
        for q in qs[1:]:
            total._same(q, "largest or smallest")
            total = total._with(q, total.value, (0.0,), total.dims)
        bounds = (function(*(q.lo for q in qs)), function(*(q.hi for q in qs)))
        return total._with(total, function(*(q.value for q in qs)), bounds, total.dims)

    return apply


larger, smaller = _spread(lambda *xs: max(xs)), _spread(lambda *xs: min(xs))
floor = _spread(lambda x: math.floor(x) if math.isfinite(x) else x)
ceil = _spread(lambda x: math.ceil(x) if math.isfinite(x) else x)

_FUNCTIONS: dict[str, Any] = {"max": larger, "min": smaller, "floor": floor, "ceil": ceil}
# Unit symbols may stand in formulas, as in 2 * FLOP/param * active.
_UNITS = {name: quantity(1, name) for name in ("FLOP", "byte", "s", "USD", "token", "param", "word")}
ENVIRONMENT = {"__builtins__": {}, **_FUNCTIONS, **_UNITS}


@functools.cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")


def evaluate(formula: str, inputs: Mapping[str, int]) -> int:
    """What a formula over whole numbers comes to."""
    return eval(_compiled(formula), ENVIRONMENT, inputs)  # formulas are ours, never the user's


def derive(key: str, unit: str, formula: str, note: str = "", /, **inputs: Quantity | float) -> Quantity:
    """Evaluate `formula`, Python arithmetic over `inputs` and unit symbols, and keep it with the result.

    Raises:
        UnitError: the formula adds what does not add, or does not come out in `unit`.
    """
    named_inputs = {name: quantity(value) for name, value in inputs.items()}
    try:
        result = quantity(eval(_compiled(formula), ENVIRONMENT, named_inputs))  # formulas are ours, never the user's
    except UnitError as error:
        raise UnitError(f"{key} = {formula}: {error}") from None
    result = replace(result, key=key, unit=unit, formula=formula, note=note, inputs=tuple(named_inputs.items()))
    result.to(unit)
    return result


def explain(q: Quantity, depth: int = 8) -> str:
    """The formula of `q`, the same with numbers put in, and so on for each input that has a formula of its own."""
    return "\n".join(_explain_lines(q, "", depth, set()))


def _explain_lines(q: Quantity, indent: str, depth: int, seen: set[str]) -> Iterator[str]:
    interval = ""
    if (q.lo, q.hi) != (q.value, q.value):
        scale = parse_unit(q.unit)[0] if q.unit else 1
        interval = f"  [{number(q.lo / scale)} .. {number(q.hi / scale)}]"
    yield f"{indent}{q.key or 'value'} = {q}{interval}" + (f"   ({q.note})" if q.note else "")
    if not q.formula or depth == 0 or q.key in seen:
        return
    seen.add(q.key)
    names = dict(q.inputs)
    put_in = re.sub(r"[A-Za-z_]\w*", lambda m: _bracketed(names[m[0]]) if m[0] in names else m[0], q.formula)
    yield f"{indent}  = {q.formula}"
    yield f"{indent}  = {put_in}"
    for name, value in q.inputs:
        if value.formula or value.note:
            yield from _explain_lines(replace(value, key=value.key or name), indent + "    ", depth - 1, seen)
    if not indent and q.assumptions:
        yield f"  assumes: {', '.join(sorted(q.assumptions))}"
    if not indent and q.unknowns:
        yield f"  not known: {', '.join(sorted(q.unknowns))}"


def _bracketed(q: Quantity) -> str:
    text = str(q)
    return f"({text})" if " " in text else text


_LINES = 20  # of the results that are printed


class Sheet(dict[str, Quantity]):
    """Results by key, in the order in which they were added."""

    def __repr__(self) -> str:
        """A screen of them: a line each, and how many there are beyond."""
        wide = max(map(len, self), default=0)
        lines = [f"  {key:{wide}}  {q}{f'   {q.note}' if q.note else ''}"[:100] for key, q in self.items()]
        if len(lines) > _LINES:
            lines[_LINES - 3 : -2] = [f"  ... {len(lines) - _LINES + 1} more"]
        return "\n".join([f"Sheet of {len(self)} results; .explain(key) prints a formula", *lines])

    def derive(self, key: str, unit: str, formula: str, note: str = "", /, **inputs: Quantity | float) -> Quantity:
        """`derive`, and keep the result under its key."""
        self[key] = derive(key, unit, formula, note, **inputs)
        return self[key]

    def put(self, key: str, q: Quantity | float, unit: str = "", note: str = "") -> Quantity:
        """Keep a quantity made elsewhere."""
        self[key] = named(quantity(q, unit), key, unit, note)
        return self[key]

    def explain(self, key: str) -> str:
        """The explanation of one result.

        Raises:
            ConfigError: no such key.
        """
        if key not in self:
            import difflib

            close = difflib.get_close_matches(key, self, n=1, cutoff=0.3)
            raise ConfigError(
                f"explain = {key!r}: there is no such result{f'; did you mean {close[0]!r}?' if close else ''}; "
                f"there are: {', '.join(self)}"
            )
        return explain(self[key])
