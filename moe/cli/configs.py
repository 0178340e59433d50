"""`moe configs`: what is shipped, and every key of a configuration. As in main.py, imports wait until it runs."""

from moe.cli.flags import Flag
from moe.cli.show import draw_table


def configs(*, keys: Flag = False) -> int:
    """List the shipped models, hardware and layouts with their sizes, or every key of a configuration.

    Args:
        keys: Every key of a configuration, as in --set KEY=VALUE: its type, default and meaning.
    """
    if keys:
        _keys()
        return 0
    _models()
    _hardware()
    _layouts()
    return 0


def si(value: float, space: str = "") -> str:
    """Four digits and a prefix: 1.834T, 22.72M; with a space before it, 557.8 G."""
    prefixes = {1e12: "T", 1e9: "G" if space else "B", 1e6: "M", 1e3: "k", 1: ""}
    scale = next(s for s in prefixes if value >= s)
    return f"{value / scale:.4g}{space}{prefixes[scale]}"


def _models() -> None:
    from moe.config import load_config, shipped
    from moe.plan import load_shape, params
    from moe.plan.models import published

    rows = []
    for name in [*shipped(), *published()]:
        shape = load_shape(name)
        counts = params(shape)
        experts = f"{shape.top_k} of {shape.n_experts}" if shape.n_experts else "dense"
        context = load_config(name).max_seq_len if name in shipped() else shape.max_seq_len
        size = f"{shape.d_model:,} x {shape.n_layers}"
        used = si(counts.active["output"])
        rows.append([name, size, experts, f"{shape.vocab_size:,}", f"{context:,}", si(counts.total), used])
    columns = ["model", "width x layers", "experts", "vocabulary", "context", "parameters", "used per token"]
    draw_table("models: moe train NAME trains the first ones; moe plan knows all", columns, rows, {"model"})


def _hardware() -> None:
    from moe.plan.hardware import hardware_names, load_hardware

    rows = []
    for name in hardware_names():
        hw = load_hardware(name)
        peak = f"{hw.peaks['bf16'].to('TFLOP/s'):,.0f}" if "bf16" in hw.peaks else ""
        memory, bandwidth = f"{hw.memory.to('GB'):,.0f} GB", f"{hw.bandwidth.to('GB/s'):,.0f} GB/s"
        rows.append([name, hw.name, memory, bandwidth, peak, f"{hw.price.to('USD/h'):.2f}"])
    columns = ["hardware", "is", "memory", "bandwidth", "TFLOP/s in bf16", "USD/h"]
    draw_table("hardware: moe plan COMMAND --hardware NAME", columns, rows, {"hardware", "is"})


def _layouts() -> None:
    from moe.plan.layout import LAYOUT_DIR, load_layout

    rows = []
    for name in sorted(path.stem for path in LAYOUT_DIR.glob("*.toml")):
        lay = load_layout(name)
        degrees = [str(getattr(lay, degree)) for degree in ("tp", "pp", "dp", "ep", "cp")]
        rows.append([name, f"{lay.gpus:,}", lay.hardware, *degrees])
    columns = ["layout", "GPUs", "hardware", "tp", "pp", "dp", "ep", "cp"]
    draw_table("layouts: moe plan COMMAND --layout NAME", columns, rows, {"layout", "hardware"})


def _keys() -> None:
    from moe.config import Config
    from moe.io.keys import sections

    columns = ["key", "type", "default", "meaning"]
    for section in sections(Config):
        title = f"[{section.name}] {section.about}" if section.name else section.about
        draw_table(title, columns, [[k.name, k.type, k.default, k.meaning] for k in section.keys], set(columns))
