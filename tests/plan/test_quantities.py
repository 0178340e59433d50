"""Units never mix, intervals hold what they should, and an explanation shows the formula that was computed."""

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.plan.quantities import (
    Sheet,
    UnitError,
    about,
    assumed,
    ceil,
    derive,
    explain,
    floor,
    given,
    larger,
    number,
    parse_unit,
    quantity,
    smaller,
    unknown,
)

UNITS = ("FLOP", "GB", "s", "USD", "token", "param", "FLOP/s", "FLOP/token", "GB/s", "USD/h", "x")


@pytest.mark.parametrize("a", UNITS)
@pytest.mark.parametrize("b", UNITS)
def test_only_equal_dimensions_add_and_compare(a: str, b: str) -> None:
    one, other = quantity(3, a), quantity(2, b)
    if a == b:
        assert (one + other).to(a) == pytest.approx(5)
        assert (one - other).to(a) == pytest.approx(1)
        assert other < one
        return
    for operation in (lambda: one + other, lambda: one - other, lambda: one < other):
        with pytest.raises(UnitError, match="do not mix"):
            operation()
    with pytest.raises(UnitError):
        one.to(b)


def test_units_known_by_hand() -> None:
    assert quantity("40 GiB").to("GB") == pytest.approx(42.94967296)
    assert quantity("100 cent").to("USD") == pytest.approx(1)
    assert quantity("8 bit").to("B") == 1
    assert (quantity("312 TFLOP/s") * quantity("1 h")).to("FLOP") == pytest.approx(312e12 * 3600)
    assert (quantity("1555 GB/s") / quantity("31.1 GB")).to("1/s") == pytest.approx(50)
    assert quantity("400 Gbit/s").to("GB/s") == pytest.approx(50)
    assert quantity("2 USD/h").to("USD/s") == pytest.approx(2 / 3600)


@pytest.mark.parametrize("text", ["40", "GB", "40 GX", "forty GB", "1e GB", "", "40 GB/s", "-40 GB", "0 GB", 40])
def test_bad_settings_are_refused_by_name_and_value(text: object) -> None:
    with pytest.raises(ConfigError, match=f"memory = {text!r}: "):
        given(text, "GB", "memory")


POSITIVE = st.floats(0.1, 1e6)


@hypothesis.given(POSITIVE, POSITIVE, st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 1), st.floats(0, 1))
def test_intervals_contain_every_outcome(a, b, wide_a, wide_b, s, t) -> None:
    """Whatever the inputs are within their intervals, the result is within its own."""
    x, y = about(a, "GB", 2 * a * wide_a), about(b, "GB", 2 * b * wide_b)
    u, v = x.lo + s * (x.hi - x.lo), y.lo + t * (y.hi - y.lo)
    for found, outcome in ((x + y, u + v), (x - y, u - v), (x * y, u * v), (x / y, u / v), (x**2, u**2)):
        slack = 1e-9 * max(abs(found.lo), abs(found.hi))
        assert found.lo - slack <= outcome <= found.hi + slack


def test_what_was_assumed_or_unknown_is_remembered() -> None:
    price = assumed("1 USD/h", "a price")
    hours = unknown(0, math.inf, "how long", "h")
    cost = derive("cost", "USD", "2 * price * hours", price=price, hours=hours)
    assert cost.assumptions == {"a price"}
    assert cost.unknowns == {"how long"}
    assert (cost.lo, cost.hi) == (0, math.inf)


def test_explanations_show_formula_numbers_and_inputs() -> None:
    sheet = Sheet()
    weights = sheet.derive("weights", "GB", "2 * byte/param * n", n=quantity(30_000_000_000, "param"))
    sheet.derive("time", "ms", "weights / bandwidth", weights=weights, bandwidth=quantity("3000 GB/s"))
    text = sheet.explain("time")
    assert "= 20 ms" in text
    assert "= (60 GB) / (3,000 GB/s)" in text
    assert "2 * byte/param * (30,000,000,000 param)" in text
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        sheet.explain("weight")


def test_a_formula_that_comes_out_in_another_unit_is_refused() -> None:
    with pytest.raises(UnitError, match="is byte, not FLOP"):
        derive("x", "FLOP", "2 * n", n=quantity("3 GB"))
    with pytest.raises(UnitError, match="bytes = a \\+ b"):
        derive("bytes", "GB", "a + b", a=quantity("3 GB"), b=quantity("3 s"))


def test_counts_stay_exact_whole_numbers() -> None:
    q = derive("n", "param", "param * a * b", a=10**12 + 1, b=10**12 - 1)
    assert q.value == 10**24 - 1
    assert isinstance(q.value, int)


def test_no_such_unit() -> None:
    with pytest.raises(UnitError, match="'furlong'"):
        parse_unit("furlong/s")
    assert explain(quantity(1)) == "value = 1"


def test_what_json_says_of_a_quantity() -> None:
    exact = derive("n", "GB", "2 * x", "twice", x=quantity("3 GB"))
    assert exact.as_dict() == {
        "value": 6.0, "unit": "GB", "formula": "2 * x", "inputs": {"x": "3 GB"}, "note": "twice",
    }  # fmt: skip
    rounded = about(3, "GB", 1)
    assert rounded.as_dict() == {"value": 3.0, "unit": "GB", "interval": [2.5, 3.5]}
    guess = assumed(unknown(1, 4, "how many", "GB"), "a guess").as_dict()
    assert (guess["value"], guess["interval"]) == (2.0, [1.0, 4.0])
    assert (guess["assumes"], guess["unknown"]) == (["a guess"], ["how many"])
    assert quantity(math.inf, "GB").as_dict()["value"] == "inf"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"), (12, "12"), (-3.0, "-3"), (1234567, "1,234,567"), (0.5, "0.5"), (12.3456, "12.35"), (999.96, "1000"),
        (12345.6, "12,346"), (123456.7, "123,500"), (1e15, "1e+15"), (2.5e12 + 0.5, "2.5e+12"), (1.234e-5, "1.234e-05"),
        (0.00012, "0.00012"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_for_people(x: float, text: str) -> None:
    assert number(x) == text


def test_the_value_taken_for_what_is_not_known() -> None:
    assert unknown(4, 9, "x").value == 6  # the geometric mean, since ranges go over orders of magnitude
    assert unknown(2, math.inf, "x").value == 2
    assert unknown(0, 5, "x").value == 1
    assert unknown(0, 5, "x", "GB", 3).to("GB") == 3


def test_nothing_and_infinity() -> None:
    assert (quantity(0) * quantity(math.inf)).value == 0
    assert (quantity(2) * quantity(math.inf)).value == math.inf
    assert (quantity(1) / 0).value == math.inf
    assert math.isnan((quantity(0) / 0).value)
    near_zero = about(1, "", 2)
    assert (near_zero.lo, near_zero.hi) == (0, 2)
    assert ((3 / near_zero).lo, (3 / near_zero).hi) == (1.5, math.inf)
    assert (7 / quantity(2)).value == 3.5
    assert isinstance((quantity(6) / 2).value, int)


def test_functions_of_formulas_carry_intervals() -> None:
    a, b = about(3.5, "GB", 1), about(4, "GB", 2)
    assert (larger(a, b).lo / 1e9, larger(a, b).value / 1e9, larger(a, b).hi / 1e9) == (3, 4, 5)
    assert (smaller(a, b).lo / 1e9, smaller(a, b).value / 1e9, smaller(a, b).hi / 1e9) == (3, 3.5, 4)
    x = about(2.5, "", 1.2)
    assert (floor(x).lo, floor(x).value, floor(x).hi) == (1, 2, 3)
    assert (ceil(x).lo, ceil(x).value, ceil(x).hi) == (2, 3, 4)
    with pytest.raises(UnitError, match="do not mix"):
        larger(a, x)


def test_explanations_show_intervals_in_the_unit_shown() -> None:
    assert explain(about(3, "GB", 1, key="room")).startswith("room = 3 GB  [2.5 .. 3.5]")
    assert explain(about(4, "", 1, key="many")).startswith("many = 4  [3.5 .. 4.5]")
