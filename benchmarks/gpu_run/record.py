"""record.json of a GPU run: read with forgiveness, written whole, put together from what the parts leave."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

NAME = "record.json"
# Of the many columns of Nsight Compute's raw page; the rest of a name differs between cards.
COUNTERS = re.compile(
    r"gpu__time_duration\.sum$|(sm|dram|lts)__throughput\.avg\.pct|dram__bytes_(read|write)\.sum$|lts__t_sector_hit_rate"
    r"|sm__inst_executed_pipe_tensor|launch__(registers_per_thread|shared_mem_per_block|waves_per_multiprocessor)"
    r"|sm__warps_active\.avg\.pct|smsp__average_warps_issue_stalled_\w+_per_issue_active|smsp__issue_active\.avg\.pct"
)


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """An object from a JSON file; None where it is none, and says so where there is a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be read, and is left as it is: {error}", flush=True)
        return None
    return found if isinstance(found, dict) else None


def open_record(folder: Path, others: list[Path]) -> dict[str, Any]:
    """The parts that stand in a folder's record and in others; of parts of one name, the one that was run last.

    A damaged record is put aside, for a person to look at.
    """
    place = folder / NAME
    found: dict[str, dict[str, Any]] = {}
    for path in [place, *(p / NAME for p in others)]:
        record = read(path)
        if record is None and path.exists() and path == place:
            place.replace(place.with_suffix(".damaged"))
        for name, part in (record or {}).get("parts", {}).items():
            if name not in found or part["date"] > found[name]["date"]:
                found[name] = part
    return {"parts": found}


def take(path: Path) -> Any:
    """What a part left in its file, which is then gone; None where there is nothing that can be read."""
    if path.suffix == ".csv":
        found = counters(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
    else:
        found = read(path)
    if found is not None:
        path.unlink()
    return found


def counters(text: str) -> dict[str, Any]:
    """The rows, one a launch, of what `ncu --csv --page raw` wrote: names, units, then values."""
    table = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(table) < 2:
        return {"rows": []}
    names, units, *launches = table
    kept = [i for i, name in enumerate(names) if COUNTERS.search(name)]
    rows = []
    for cells in launches:
        row: dict[str, Any] = {"kernel": cells[names.index("Kernel Name")], "grid": cells[names.index("Grid Size")]}
        row |= {names[i]: value for i in kept if (value := _value(cells[i])) is not None}
        rows.append(row)
    return {"units": {names[i]: units[i] for i in kept if units[i]}, "rows": rows}


def _value(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None
