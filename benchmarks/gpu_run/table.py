"""README.md of a GPU run: the record as tables."""

from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Format = Callable[[Any], str]


def markdown(record: dict[str, Any]) -> str:
    """How every part ended, what held the GPU back, and the rows of each."""
    parts: dict[str, Row] = record["parts"]
    lines = ["# GPU run", "", *_machines(parts), "", *_endings(parts)]
    for name, part in parts.items():
        found = part.get("record")
        if isinstance(found, dict):
            lines += _section(name, found)
    return "\n".join(lines) + "\n"


def _machines(parts: dict[str, Row]) -> Iterator[str]:
    """A line for each different machine, with the parts that ran there."""
    seen: dict[str, list[str]] = {}
    for name, part in parts.items():
        text = ", ".join(f"{k} {v}" for k, v in part.get("machine", {}).items())
        seen.setdefault(text, []).append(name)
    for text, names in seen.items():
        yield text if len(seen) == 1 else f"{', '.join(names)}: {text}"


def _endings(parts: dict[str, Row]) -> list[str]:
    rows = []
    for name, part in parts.items():
        gpu = part.get("gpu") or {}
        spans = {k: "-".join(f"{v:.0f}" for v in gpu[k][::2]) for k in ("sm_mhz", "watts", "celsius") if k in gpu}
        held = ", ".join(f"{text} {share:.0%}" for text, share in gpu.get("held_back", {}).items())
        rows.append({"part": name, **part, **spans, "held": held})
    columns: list[tuple[str, str, Format]] = [
        ("part", "part", str), ("date", "date", str), ("ended", "status", str), ("seconds", "seconds", _number(0)),
        ("kernels compiled", "compiled", str), ("SM MHz", "sm_mhz", str), ("W", "watts", str), ("°C", "celsius", str),
        ("held back by", "held", str),
    ]  # fmt: skip
    return _table(rows, columns)


def _number(digits: int) -> Format:
    return lambda v: f"{v:,.{digits}f}"


def _percent(v: float) -> str:
    return f"{v:.0%}"


def _times(v: float) -> str:
    return f"{v:.2f}"


# Key of a row -> (heading, format): what is not in a table's rows has no column.
COLUMNS: dict[str, tuple[str, Format]] = {
    "shape": ("shape", str), "tokens": ("T", str), "d_model": ("D", str), "vocab_size": ("V", str),
    "routing": ("routing", str), "kind": ("what", str), "product": ("product", str), "what": ("what", str),
    "requests": ("requests", str), "length": ("positions", str), "kept": ("kept in", str), "touched": ("experts", str),
    "side": ("side", str), "path": ("path", str), "tile": ("tile", str), "ms": ("ms", _number(3)),
    "us": ("µs", _number(1)), "tflops": ("TFLOP/s", _number(0)), "gbs": ("GB/s", _number(0)),
    "of_copy": ("of the copy", _percent),
    "of_cublas_peak": ("of cuBLAS", _percent), "of_cublas": ("of cuBLAS", _percent),
    "of_forward": ("of the forward", _percent), "ours_is_faster_by": ("time / ours", _times),
    "ratio": ("time / ours", _times), "kept_gib": ("GiB kept", _times), "peak_gib": ("GiB peak", _times),
    "registers": ("registers", str), "spills": ("spills", str), "shared": ("shared", _number(0)),
    "compile_s": ("compile s", _number(1)), "problem": ("problem", str),
}  # fmt: skip


def _section(name: str, found: Row) -> list[str]:
    lines = ["", f"## {name}"]
    scalars = {k: v for k, v in found.items() if isinstance(v, str | int | float) and k != "machine"}
    if scalars:
        lines += ["", "; ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scalars.items())]
    for key, rows in found.items():
        if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows):
            tables = _steps(rows) if "component" in str(rows[0].get("rows", "")) else _rows(name, key, rows)
            lines += ["", *tables]
    return lines


def _rows(name: str, key: str, rows: list[Row]) -> list[str]:
    if name == "ncu":
        return _counters(rows)
    keys = [k for k in COLUMNS if any(k in r for r in rows)]
    if not keys:
        return [f"{len(rows)} {key} in record.json"]
    return _table(rows, [(COLUMNS[k][0], k, COLUMNS[k][1]) for k in keys])


def _counters(rows: list[Row]) -> list[str]:
    """A column a launch: there are more counters than launches."""
    counters = dict.fromkeys(k for r in rows for k in r if k not in ("kernel", "grid"))
    turned = [{"counter": c, **{str(i): r.get(c) for i, r in enumerate(rows)}} for c in counters]
    heads: list[tuple[str, str, Format]] = [(r["kernel"], str(i), _number(2)) for i, r in enumerate(rows)]
    return _table(turned, [("counter", "counter", str), *heads])


def _steps(steps: list[Row]) -> list[str]:
    """Where the time of a step goes (benchmarks/step.py): components, by phase."""
    lines: list[str] = []
    for step in steps:
        lines += [
            f"{step['name']}, {step['what']}, {step['batch']} x {step['seq_len']}, {step['dtype']}: "
            f"{step['seconds'] * 1e3:.2f} ms, peak {step['peak_gib']:.1f} GiB",
            "",
        ]
        rows = []
        for row in step["rows"]:
            seconds = max(row["seconds"], 1e-9)
            shown = {"component": row["component"], "phase": row["phase"], "ms": seconds * 1e3}
            shown |= {"tflops": row["flop"] / seconds / 1e12} if row["flop"] else {}
            shown |= {"gbs": row["bytes"] / seconds / 1e9} if row["bytes"] else {}
            rows.append(shown | ({} if row["floor"] is None else {"share": row["floor"] / seconds}))
        columns: list[tuple[str, str, Format]] = [
            ("component", "component", str), ("phase", "phase", str), ("ms", "ms", _number(3)),
            ("TFLOP/s", "tflops", _number(0)), ("GB/s", "gbs", _number(0)), ("of the roofline", "share", _percent),
        ]  # fmt: skip
        lines += [*_table(rows, columns), ""]
    return lines[:-1]


def _table(rows: list[Row], columns: list[tuple[str, str, Format]]) -> list[str]:
    """Columns are (heading, key, format); what a row lacks stays blank."""

    def cell(value: Any, how: Format) -> str:
        if value is None:
            return ""
        try:
            return how(value).replace("|", "/")
        except (TypeError, ValueError):
            return str(value).replace("|", "/")

    lines = [f"| {' | '.join(heading for heading, _, _ in columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(row.get(key), how) for _, key, how in columns)} |" for row in rows]
