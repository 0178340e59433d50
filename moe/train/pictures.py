"""Pictures of a run, drawn from its metrics.jsonl: loss.png, experts.png, speed.png; of a later stage stages.png."""

from pathlib import Path
from typing import Any

import numpy as np

from moe.io import figures
from moe.train.metrics import stages

PICTURES = "pictures"


def draw(run_dir: str | Path) -> list[Path] | None:
    """Draws what `run_dir`/metrics.jsonl holds into `run_dir`/pictures; None where matplotlib is not installed.

    Returns:
        The PNG files; fewer where a run has not measured something (yet).
    """
    if not figures.can_draw():
        return None
    *before, records = stages(Path(run_dir))
    train = _of_kind(records, "train")
    if not train:
        return []
    place = Path(run_dir) / PICTURES
    drawn = {"loss": _loss(train, records), "experts": _experts(train), "speed": _speed(train)}
    if before := [earlier for earlier in before if _of_kind(earlier, "train")]:
        drawn["stages"] = _stages([*before, records])
    return [figures.save(figure, place, name) for name, figure in drawn.items()]


def _loss(train: list[dict[str, Any]], records: list[dict[str, Any]]) -> Any:
    """Training loss on the left, held-out bits per byte beside the compressors' on the right."""
    evals = _of_kind(records, "eval")
    figure, axes = figures.figure(1, 2 if evals else 1, width=5.6, height=4.2)
    scale, unit = _token_scale(train)
    x = np.array([r["tokens"] for r in train]) / scale
    lm = np.array([r["lm"] for r in train])
    smooth = _smoothed(lm)
    axes[0].plot(x, lm, color=figures.COLOURS[0], alpha=0.25, linewidth=1)
    axes[0].plot(x, smooth, color=figures.COLOURS[0], linewidth=2)
    figures.label_end(axes[0], x[-1], smooth[-1], f"{smooth[-1]:.2f}", figures.COLOURS[0])
    axes[0].set_xlim(0, x[-1])
    axes[0].set_ylim(*_range_without_start(lm))
    figures.title(
        axes[0], "Training loss", "nats per token; thin: each log point, thick: mean around it", f"tokens {unit}"
    )
    if evals:
        final = next((r for r in records if r["kind"] == "final"), None)
        _bits_per_byte(axes[1], evals, final, scale, unit)
    return figure


def _bits_per_byte(
    axis: Any, evals: list[dict[str, Any]], final: dict[str, Any] | None, scale: float, unit: str
) -> None:
    x = np.array([r["tokens"] for r in evals]) / scale
    names = list(evals[-1]["bits_per_byte"])
    if len(names) == 2:  # one source: the total says the same
        names = names[:1]
    labels = []
    for i, name in enumerate(names):
        y = np.array([r["bits_per_byte"][name] for r in evals])
        colour = figures.INK if name == "total" else figures.COLOURS[i % len(figures.COLOURS)]
        axis.plot(x, y, color=colour, linewidth=1.2 if name == "total" else 2, marker="o", markersize=3, clip_on=False)
        labels.append((y[-1], f"{name} {y[-1]:.2f}", colour))
    if final is not None:
        for name, flags in (("gzip", "gzip -9"), ("xz", "xz -9e")):
            if name not in final["compression"]:  # of conversations
                continue
            value = final["compression"][name]
            axis.axhline(value, color=figures.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            labels.append((value, f"{flags} {value:.2f}", figures.MUTED))
    values = [y for r in evals for y in r["bits_per_byte"].values()] + [label[0] for label in labels]
    axis.set_ylim(max(0.0, min(values) - 0.15 * (max(values) - min(values)) - 0.02), max(values) * 1.03)
    axis.set_xlim(0, x[-1])
    figures.label_ends(axis, x[-1], labels)
    of_text = final is None or bool(final["compression"])
    note = "bits per byte, lower is better" + ("; dashed: general compressors" if of_text else "")
    figures.title(axis, "Held-out text" if of_text else "Held-out responses", note, f"tokens {unit}")


def _experts(train: list[dict[str, Any]]) -> Any:
    """One panel per layer: experts down, tokens across, colour by load relative to an even one."""
    load_TLE = np.array([r["load"] for r in train])
    n_layers, n_experts = load_TLE.shape[1:]
    layers = figures.shown_layers(n_layers)
    figure, axes, rows = figures.panels(len(layers))
    scale, unit = _token_scale(train)
    end = train[-1]["tokens"] / scale
    image = None
    for axis, layer in zip(axes, layers, strict=False):
        image = figures.octaves(axis, load_TLE[:, layer].T * n_experts, extent=(0, end, n_experts - 0.5, -0.5))
        worst = (load_TLE[-1, layer] * n_experts).max()
        figures.title(axis, f"Layer {layer}", f"busiest expert at the end: {worst:.2f}x", f"tokens {unit}", grid=False)
        axis.set_ylabel("expert", color=figures.MUTED)
        axis.set_yticks(range(0, n_experts, max(1, n_experts // 4)))
    figures.octave_bar(figure, image, axes, shrink=min(1.0, 1.4 / rows))
    return figure


def _speed(train: list[dict[str, Any]]) -> Any:
    figure, (axis,) = figures.figure(1, 1, width=6.4, height=3.2)
    scale, unit = _token_scale(train)
    x = np.array([r["tokens"] for r in train]) / scale
    y = np.array([r["tokens_per_second"] for r in train])
    axis.plot(x, y, color=figures.COLOURS[2], linewidth=1.5)
    axis.set_xlim(0, x[-1])
    axis.set_ylim(0, 1.15 * y.max())
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    figures.label_end(axis, x[-1], y[-1], f"{y[-1]:,.0f}", figures.COLOURS[2])
    figures.title(axis, "Speed", f"tokens per second; median {np.median(y):,.0f}", f"tokens {unit}")
    return figure


def _stages(runs: list[list[dict[str, Any]]]) -> Any:
    """All stages of a recipe, one after the other: training loss, held-out bits per byte, tokens in a step."""
    figure, (loss, held_out, batch) = figures.figure(1, 3, width=4.6, height=4.2)
    begins = np.cumsum([0, *(_of_kind(records, "train")[-1]["tokens"] for records in runs)])
    scale, unit = _token_scale([{"tokens": int(begins[-1])}])
    losses = []
    for i, records in enumerate(runs):
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        train, evals = _of_kind(records, "train"), _of_kind(records, "eval")
        x = (begins[i] + np.array([r["tokens"] for r in train])) / scale
        lm = np.array([r["lm"] for r in train])
        losses.append(lm)
        loss.plot(x, lm, color=colour, alpha=0.25, linewidth=1)
        loss.plot(x, _smoothed(lm), color=colour, linewidth=2)
        steps = np.array([r["batch_tokens"] for r in train])
        batch.plot([begins[i] / scale, *x], [steps[0], *steps], color=colour, linewidth=2, drawstyle="steps-pre")
        for axis in (loss, held_out, batch):
            axis.axvline(begins[i] / scale, color=figures.GRID, linewidth=1)
        batch.annotate(
            _stage_name(records), (1, 0), xytext=(-4, 6 + 12 * (len(runs) - 1 - i)), color=colour, fontsize=8,
            xycoords="axes fraction", textcoords="offset points", ha="right",
        )  # fmt: skip
        for name in evals[-1]["bits_per_byte"] if evals else ():
            if name != "total" or len(evals[-1]["bits_per_byte"]) == 1:
                x = (begins[i] + np.array([r["tokens"] for r in evals])) / scale
                y = [r["bits_per_byte"][name] for r in evals]
                held_out.plot(x, y, color=colour, linewidth=1.5, marker="o", markersize=3, clip_on=False)
                held_out.annotate(
                    name, (x[-1], y[-1]), xytext=(-2, -11), textcoords="offset points", color=colour, fontsize=8,
                    ha="right", annotation_clip=False,
                )  # fmt: skip
    for axis in (loss, held_out, batch):
        axis.set_xlim(0, begins[-1] / scale)
    loss.set_ylim(*_range_without_start(np.concatenate(losses)))
    batch.set_ylim(0, None)
    batch.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    figures.title(loss, "Training loss", "nats per token, stage after stage", f"tokens {unit}")
    figures.title(held_out, "Held out", "bits per byte of text; of responses in the last", f"tokens {unit}")
    figures.title(batch, "Batch", "tokens in a step", f"tokens {unit}")
    return figure


def _of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == kind]


def _stage_name(records: list[dict[str, Any]]) -> str:
    start = records[0]
    return f"{start['name']}: windows of {start['seq_len']:,}" if start["kind"] == "start" else "before"


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value's neighbours: up to a fortieth of the run to each side, fewer near the ends."""
    sums = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    reach = np.minimum(len(values) // 40, np.minimum(i, len(values) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def _range_without_start(values: np.ndarray) -> tuple[float, float]:
    """Limits that leave room for what happens after the first steep fall."""
    top = float(np.quantile(values, 0.98)) if len(values) > 20 else float(values.max())
    low = float(values.min())
    margin = 0.08 * max(top - low, 0.1)
    return low - margin, top + margin


def _token_scale(train: list[dict[str, Any]]) -> tuple[float, str]:
    most = train[-1]["tokens"]
    for scale, unit in ((1e9, "(billions)"), (1e6, "(millions)"), (1e3, "(thousands)")):
        if most >= 2 * scale:
            return scale, unit
    return 1.0, ""
