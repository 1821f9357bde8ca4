"""The one style of the plots in benchmarks/results: small files, readable at the width of a README, safe for all eyes."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from jaxrl_llm.training.logging import read_metrics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito, which differ for the colour-blind too."""
LEVEL_STYLES = ("--", ":", "-.")
LEGEND_INSIDE = 4
"""A longer legend stands beside the axes, where it hides nothing."""
MARKERS_BELOW = 20
PALETTE = 64

Curve: TypeAlias = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


def read_curve(folder: str | os.PathLike, metric: str) -> tuple[list[int], list[float]]:
    """Reads one metric of a run from its metrics.jsonl: (steps, values), only the steps where it was logged.

    Raises:
        FileNotFoundError: `folder` holds no metrics.jsonl.
        ValueError: The metric was never logged.
    """
    records = read_metrics(folder)
    points = [(record["step"], record[metric]) for record in records if metric in record]
    if not points:
        known = sorted({name for record in records for name in record} - {"step", "time"})
        raise ValueError(f"metric {metric!r} was never logged in {folder}; there are {known}.")
    return [step for step, _ in points], [value for _, value in points]


def curves(
    path: str | os.PathLike,
    lines: Mapping[str, Curve],
    xlabel: str,
    ylabel: str,
    title: str,
    hlines: Mapping[str, float] | None = None,
    *,
    xlog: bool = False,
) -> None:
    """Draws curves over one pair of axes into a PNG file, making its folder where there is none.

    Args:
        path: The file to write.
        lines: (x, y) by label; values that are NaN leave a gap.
        xlabel: What is on the horizontal axis, with its unit.
        ylabel: What is on the vertical axis, with its unit.
        title: What the plot shows, in a few words.
        hlines: Levels to compare with, by label: a baseline, a bound.
        xlog: Whether the horizontal axis is logarithmic.

    Raises:
        ValueError: There are no curves, one has not as many x as y, or none of its values is a number.
    """
    if not lines:
        raise ValueError("lines must hold at least one curve, as in {'loss': (steps, losses)}, got none.")
    figure, axes = _axes(xlabel, ylabel, title)
    for index, (label, (x, y)) in enumerate(lines.items()):
        if len(x) != len(y) or not any(math.isfinite(value) for value in y):
            raise ValueError(f"the curve {label!r} must have as many x as y, some finite, got {len(x)} x, {len(y)} y.")
        color, marker = COLORS[index % len(COLORS)], "o" if len(x) < MARKERS_BELOW else ""
        axes.plot(x, y, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)
    for index, (label, level) in enumerate((hlines or {}).items()):
        axes.axhline(level, color="0.4", linestyle=LEVEL_STYLES[index % len(LEVEL_STYLES)], linewidth=1.3, label=label)
    if xlog:
        axes.set_xscale("log")
    _write(path, figure, axes, len(lines) + len(hlines or {}))


def band_curves(
    path: str | os.PathLike,
    lines: Mapping[str, np.ndarray],
    x: Sequence[float] | np.ndarray,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Draws the mean over seeds of each curve, with its 95 % interval (Student's t) as a band, into a PNG file.

    Args:
        path: The file to write.
        lines: Values by label, [seeds, points], at least 2 seeds.
        x: Where the points are.
        xlabel: What is on the horizontal axis, with its unit.
        ylabel: What is on the vertical axis, with its unit.
        title: What the plot shows, in a few words.
    """
    from scipy.stats import t

    figure, axes = _axes(xlabel, ylabel, title)
    for index, (label, values) in enumerate(lines.items()):
        seeds, color = values.shape[0], COLORS[index % len(COLORS)]
        half = t.ppf(0.975, seeds - 1) * values.std(axis=0, ddof=1) / seeds**0.5
        mean = values.mean(axis=0)
        axes.plot(x, mean, color=color, linewidth=1.8, label=label)
        axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    _write(path, figure, axes, len(lines))


def _axes(xlabel: str, ylabel: str, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(path: str | os.PathLike, figure, axes, labels: int) -> None:
    import PIL.Image
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if labels > LEGEND_INSIDE:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    elif labels > 1:
        axes.legend(frameon=False, fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)  # No window, whatever the backend of pyplot is.
    canvas.draw()
    image = PIL.Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    image.quantize(PALETTE).save(path, format="PNG", optimize=True)  # A third of the size of full colour.
