"""The flags that commands of `moe plan` share, each with its help once, and what they stand for.

As in main.py, what reads them is imported on use.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from moe.cli.flags import Words, assignments

if TYPE_CHECKING:
    from moe.plan.hardware import Hardware
    from moe.plan.layout import Layout

MODEL = "gpt4-8k"
Model = Annotated[str, arg(metavar="MODEL", help="A shipped name, a .toml, or a Hugging Face config.json.")]
Context = Annotated[int, arg(help="Tokens that each sequence has.")]
Batch = Annotated[int, arg(help="Sequences that share one pass; a pipeline has that many in each stage.")]
Name = Annotated[str, arg(metavar="NAME")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...")]
Dtypes = Annotated[tuple[str, ...], arg(metavar="DTYPE ...")]
Amount = Annotated[str, arg(metavar="AMOUNT")]
MaybeAmount = Annotated[str | None, arg(metavar="AMOUNT")]
Weights = Annotated[str, arg(metavar="DTYPE", help="Precision of the weights: bf16, fp8, int8, fp4, ...")]
Settings = Annotated[
    Words,
    arg(name="set", metavar="KEY=VALUE ...", help="Settings of the layout, such as interleave=4 recompute=selective."),
]


@dataclass(frozen=True)
class Cluster:
    """On what: a layout with changes, on hardware."""

    layout: Annotated[str, arg(metavar="NAME", help="A shipped layout or a TOML file.")]
    set_: Settings = ()
    hardware: Annotated[
        str | None, arg(metavar="NAME", help="A shipped name or a TOML file. Default: the layout's.")
    ] = None

    def read(self) -> "tuple[Layout, Hardware]":
        """Both, from their files.

        Raises:
            ConfigError: no such file, or a setting that cannot be.
        """
        from moe.plan.hardware import load_hardware

        layout = read_layout(self.layout, self.set_)
        return layout, load_hardware(self.hardware or layout.hardware)

    def serving(self) -> "Cluster":
        """The same; the layout that serves, in place of the one that trains where none was asked for."""
        return replace(self, layout=SERVE.layout) if self.layout == TRAIN.layout else self


On = Annotated[Cluster, OmitArgPrefixes, arg(name="")]
TRAIN, SERVE = Cluster("gpt4-train"), Cluster("gpt4-serve")


def read_layout(name: str, settings: tuple[tuple[str, ...], ...]) -> "Layout":
    """A layout from its file, with what --set changes.

    Raises:
        ConfigError: no such file, or a setting that cannot be.
    """
    from moe.errors import ConfigError
    from moe.io.toml import parse_value
    from moe.plan.layout import layout_from, load_layout

    table: dict[str, Any] = {}
    for text in assignments(settings):
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r}: must be key=value, such as tp=8")
        table[key] = parse_value(value)
    return layout_from(table, base=load_layout(name))
