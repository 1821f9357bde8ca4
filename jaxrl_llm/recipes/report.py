"""Plots of a run's metrics, and a report of it as one HTML file that needs nothing else.

plot_metrics("runs/sft", {"Loss (nats per token)": ["loss", "eval/loss"]}, "runs/sft/metrics.png")
write_report("runs/sft/report.html", "SFT", [Section("Training", images=("runs/sft/metrics.png",))])
"""

import base64
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.recipes.progress import format_cell, is_number
from jaxrl_llm.training.logging import read_metrics

_SMOOTH_FROM = 60  # Points from which on a running mean is drawn over a curve.


class ReportTable(NamedTuple):
    """A table of a report."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Text and numbers, as many in a row as there are columns; text keeps its line breaks."""
    caption: str = ""


class Section(NamedTuple):
    """A part of a report: its text, then its tables, then its images."""

    heading: str
    text: str = ""
    """Plain text; an empty line starts a new paragraph."""
    tables: Sequence[ReportTable] = ()
    images: Sequence[str | os.PathLike] = ()
    """Paths of PNG files, which the report then contains."""


def plot_metrics(
    folder: str | os.PathLike,
    panels: Mapping[str, Sequence[str]],
    path: str | os.PathLike,
    *,
    x_label: str = "training step",
    bands: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> None:
    """Draws metrics of a run over its steps, one panel per title, into a PNG file.

    From 60 points on, the points are drawn pale under their running mean. Values that are not finite leave a gap.

    Args:
        folder: The folder of the run, which holds metrics.jsonl.
        panels: The metrics to draw together, by title. What stands in parentheses at the end of a title is the unit,
            and labels the vertical axis: "Loss (nats per token)".
        path: The PNG file to write.
        x_label: What a step is.
        bands: More panels, above the others: by title, metrics by label that are drawn as their mean, with a 95 %
            interval (Student's t) where there are several.

    Raises:
        ValueError: There are no panels, or a metric is not in the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    curves = {name: _curve(records, name, folder) for names in panels.values() for name in names}
    if not curves:
        raise ValueError("panels must name at least one metric, as in {'Loss': ['loss']}.")
    # One column: steps line up from panel to panel, and the plot stays legible on a phone.
    bands = bands or {}
    count = len(panels) + len(bands)
    figure = Figure(figsize=(7.5, 2.8 * count), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # No window, whatever the backend of pyplot is.
    for index, (title, groups) in enumerate(bands.items(), start=1):
        axes = figure.add_subplot(count, 1, index)
        _draw_bands(axes, title, {label: _band(records, names, folder) for label, names in groups.items()})
        axes.set_xlabel(x_label)
    for index, (title, names) in enumerate(panels.items(), start=1 + len(bands)):
        axes = figure.add_subplot(count, 1, index)
        _draw_panel(axes, title, {name: curves[name] for name in names})
        axes.set_xlabel(x_label)
    figure.savefig(path)


def write_report(path: str | os.PathLike, title: str, sections: Sequence[Section]) -> None:
    """Writes a report as one HTML file that needs nothing else: no network, no scripts, readable on a phone.

    All text is escaped, so that samples of a model are shown and never interpreted.

    Raises:
        FileNotFoundError: An image does not exist.
        ValueError: A table has a row with more or fewer cells than columns.
    """
    import jinja2

    for table in [table for section in sections for table in section.tables]:
        for number, row in enumerate(table.rows, start=1):
            if len(row) != len(table.columns):
                raise ValueError(
                    f"row {number} of the table {table.caption!r} has {len(row)} cells, "
                    f"but there are {len(table.columns)} columns."
                )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "cell": format_cell,
        "is_number": is_number,
        "data_uri": _data_uri,
        "paragraphs": _paragraphs,
    }
    html = environment.from_string(_TEMPLATE).render(title=title, sections=sections)
    Path(path).write_text(html, "utf-8")


def _curve(records: list[dict[str, Any]], name: str, folder: str | os.PathLike) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    if not points:
        known = sorted({key for record in records for key in record} - {"step", "time"})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {known}."
        raise ValueError(f"metric {name!r} was never logged in {folder}: {hint}")
    steps, values = zip(*points, strict=True)
    return list(steps), [value if math.isfinite(value) else math.nan for value in values]


def _band(
    records: list[dict[str, Any]], names: Sequence[str], folder: str | os.PathLike
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Gives steps, mean and half of the interval of several metrics, over those that are finite at a step."""
    from scipy.stats import t

    steps, _ = _curve(records, names[0], folder)
    values = np.array([_curve(records, name, folder)[1] for name in names])
    counts = (~np.isnan(values)).sum(0)
    mean = np.where(counts > 0, np.nansum(values, 0) / np.maximum(counts, 1), np.nan)
    spread = np.sqrt(np.nansum((values - mean) ** 2, 0) / np.maximum(counts - 1, 1) / np.maximum(counts, 1))
    return steps, mean, np.where(counts > 1, t.ppf(0.975, np.maximum(counts - 1, 1)) * spread, 0)


def _draw_bands(axes: Any, title: str, lines: Mapping[str, tuple[list[int], np.ndarray, np.ndarray]]) -> None:
    heading, unit = _split_unit(title)
    for label, (steps, mean, half) in lines.items():
        (line,) = axes.plot(steps, mean, linewidth=1.6, label=label)
        axes.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_title(heading + ", mean and 95 % interval", loc="left", fontweight="bold")
    axes.set_ylabel(unit or "value")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(lines) <= 12:
        axes.legend(frameon=False, fontsize=8)


def _draw_panel(axes: Any, title: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    heading, unit = _split_unit(title)
    for name, (steps, values) in curves.items():
        smooth = len(values) >= _SMOOTH_FROM
        marker = "o" if len(values) < 20 else ""
        (line,) = axes.plot(steps, values, marker=marker, markersize=4, linewidth=1.6, label=name)
        if smooth:
            line.set(alpha=0.3, linewidth=0.8, label=None)
            mean = _running_mean(values, 2 * (len(values) // 60) + 1)
            axes.plot(steps, mean, color=line.get_color(), linewidth=1.8, label=name)
    axes.set_title(heading, loc="left", fontweight="bold")
    axes.set_ylabel(unit or (next(iter(curves)) if len(curves) == 1 else "value"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)


def _running_mean(values: list[float], width: int) -> np.ndarray:
    """Returns the mean of the `width` points (odd) around each point, fewer at the ends, without those that are NaN."""
    padding = np.full(width // 2, np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([padding, values, padding]), width)
    counts = np.sum(~np.isnan(windows), axis=1)
    return np.where(counts > 0, np.nansum(windows, axis=1) / np.maximum(counts, 1), np.nan)


def _split_unit(title: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.+?)\s*\(([^()]+)\)\s*", title)
    return (match[1], match[2]) if match else (title, "")


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _data_uri(path: str | os.PathLike) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d8dce2, #3a3f47); --head: light-dark(#f3f5f8, #24282e); }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; font: 16px/1.55 system-ui, sans-serif;
  color: light-dark(#1c2127, #e4e7eb); background: light-dark(#fff, #16191d); }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p { white-space: pre-line; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: .4rem; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { border: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
th { background: var(--head); }
td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 6rem; }
.number { min-width: 3.5rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.heading }}</h2>
{% for paragraph in section.text | paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
<figure>
{% if table.caption %}
<figcaption>{{ table.caption }}</figcaption>
{% endif %}
<table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if cell | is_number %} class="number"{% endif %}>{{ cell | cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</figure>
{% endfor %}
{% for image in section.images %}
<figure><img src="{{ image | data_uri }}" alt="{{ section.heading }}"></figure>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
