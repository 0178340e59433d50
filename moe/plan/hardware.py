"""Accelerators: memory, bandwidth, dense peaks, links and a price, from TOML with a citation for every value.

A peak that is not marked as dense is refused: data sheets print the peak of 2:4 sparsity, twice what a model gets.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.config import CONFIG_DIR
from moe.errors import ConfigError
from moe.io.toml import read_file
from moe.plan.quantities import Quantity, given
from moe.plan.sizes import BYTES

HARDWARE_DIR = CONFIG_DIR / "hardware"
_SECTIONS = ("links", "peak", "sources")


@dataclass(frozen=True)
class Hardware:
    """One accelerator. `node` and `network` are what one of them sends, in one direction: within its node, and out."""

    name: str
    memory: Quantity
    bandwidth: Quantity
    node_size: int
    node: Quantity
    network: Quantity
    price: Quantity
    peaks: dict[str, Quantity] = field(hash=False)

    def peak(self, dtype: str) -> Quantity:
        """The dense peak in FLOP/s.

        Raises:
            ConfigError: this hardware has no such peak.
        """
        if dtype not in self.peaks:
            raise ConfigError(f"dtype = {dtype!r}: {self.name} has peaks for {', '.join(self.peaks)} only")
        return self.peaks[dtype]

    def compute_dtype(self, weights: str) -> str:
        """What products run in with weights of this dtype: theirs, or the next wider one with a peak."""
        wider = {"mxfp4": "fp4", "fp4": "fp8", "int8": "fp8", "fp8": "bf16", "fp16": "bf16", "tf32": "fp32"}
        dtype = weights
        while dtype not in self.peaks:
            if dtype not in wider:
                raise ConfigError(f"dtype = {weights!r}: {self.name} has peaks for {', '.join(self.peaks)} only")
            dtype = wider[dtype]
        return dtype


def hardware_names() -> list[str]:
    """The names that `load_hardware` accepts."""
    return sorted(path.stem for path in HARDWARE_DIR.glob("*.toml"))


# Shipped hardware by the words of the name that a device gives itself, as torch.cuda.get_device_name does: its maker's
# left out, and all of them. A slice of a card (MIG) or another card of its line (H100 NVL, GH200) is none of these.
DEVICES = {
    "B200": "b200",
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100 80GB HBM3": "h100-sxm",
    "A100 SXM4 40GB": "a100-40",
    "A100 PCIE 40GB": "a100-40",
    "A100 SXM4 80GB": "a100-80",
    "A100 PCIE 80GB": "a100-80",
    "A100 80GB PCIe": "a100-80",
    "MI300X": "mi300x",
    "MI300X OAM": "mi300x",
}
_MAKERS = {"NVIDIA", "AMD", "Instinct", "Tesla"}


def device_hardware(device_name: str) -> Hardware | None:
    """The hardware of a device that calls itself "NVIDIA H100 80GB HBM3" or the like; None where no file is of it."""
    name = DEVICES.get(" ".join(word for word in re.split(r"[\s-]+", device_name) if word not in _MAKERS))
    return load_hardware(name) if name else None


def load_hardware(name_or_path: str | Path) -> Hardware:
    """Read shipped hardware by name ("h100-sxm") or a TOML file by path.

    Raises:
        ConfigError: no such name or file; a key unknown, missing, without a source, of another unit, or a peak that is
            not marked as dense.
    """
    table, place = read_table(name_or_path, HARDWARE_DIR, "hardware")
    _check_keys(
        table, {"name", "source", "node_size", "memory", "bandwidth", "price", "links", "peak", "sources"}, place
    )
    links, peak, sources = (_section(table, key, place) for key in _SECTIONS)
    _check_keys(links, {"node", "network"}, f"{place}: links")
    _check_keys(peak, {"dense", *BYTES}, f"{place}: peak")
    if peak.get("dense") is not True:
        raise ConfigError(
            f"{place}: peak.dense = {peak.get('dense')!r}: peaks must be those without sparsity, half of what data "
            "sheets print for it; give these and set dense = true"
        )

    def read(key: str, owner: dict[str, Any], unit: str, section: str = "") -> Quantity:
        source = sources.get(section + key, sources.get(section.rstrip("."), table.get("source")))
        if not isinstance(source, str) or not source:
            raise ConfigError(
                f"{place}: {section}{key} has no source; cite one as source, or as sources.{section}{key}"
            )
        if key not in owner:
            raise ConfigError(f'{place}: {section}{key} is missing; give it as "1 {unit}"')
        return given(owner[key], unit, f"{place}: {section}{key}", note=source)

    node_size = table.get("node_size", 1)
    if type(node_size) is not int or node_size < 1:
        raise ConfigError(f"{place}: node_size = {node_size!r}: must be a whole number of at least 1")
    return Hardware(
        str(table.get("name", place)),
        read("memory", table, "GB"),
        read("bandwidth", table, "GB/s"),
        node_size,
        read("node", links, "GB/s", "links."),
        read("network", links, "GB/s", "links."),
        read("price", table, "USD/h"),
        {dtype: read(dtype, peak, "TFLOP/s", "peak.") for dtype in peak if dtype != "dense"},
    )


def read_table(name_or_path: str | Path, home: Path, what: str) -> tuple[dict[str, Any], str]:
    """A TOML table by shipped name or by path, and what to call it in messages."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = home / f"{name_or_path}.toml"
        if not path.is_file():
            names = sorted(p.stem for p in home.glob("*.toml"))
            close = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.3)
            raise ConfigError(
                f"{what} = {str(name_or_path)!r}: there is none of that name"
                f"{f'; did you mean {close[0]!r}?' if close else ''}; there are: {', '.join(names)}; "
                "or give a path to a .toml file"
            )
    return read_file(path), path.name


def _section(table: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {key} = {value!r}: is a section: write [{key}]")
    return value


def _check_keys(table: dict[str, Any], known: set[str], place: str) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.4)
            raise ConfigError(f"{place}: unknown key {key!r}{f'; did you mean {close[0]!r}?' if close else ''}")
