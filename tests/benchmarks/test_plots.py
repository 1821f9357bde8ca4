import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.plots import COLORS, curves, read_curve
from jaxrl_llm.training.logging import RunLogger


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are drawn."""
    figures = []
    draw = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: (figures.append(self.figure), draw(self))[1])
    return figures


def test_a_metric_is_read_where_it_was_logged(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        for step in range(1, 7):
            logger.log(step, {"loss": 1.0 / step} | ({"eval/loss": 2.0 * step} if step % 3 == 0 else {}))
    assert read_curve(tmp_path, "eval/loss") == ([3, 6], [6.0, 12.0])
    with pytest.raises(ValueError, match=r"'reward' was never logged in .*\['eval/loss', 'loss'\]"):
        read_curve(tmp_path, "reward")


def test_a_plot_is_small_and_has_its_curves_levels_and_labels(tmp_path, drawn):
    steps, noise = np.arange(400), np.random.default_rng(0).normal(size=(5, 400))
    betas = (0.05, 0.1, 0.3, 0.5, 1.0)
    noisy = {f"beta {beta}": (steps, beta * np.sqrt(steps) + row) for beta, row in zip(betas, noise, strict=True)}
    path = tmp_path / "plots" / "sweep.png"
    curves(path, noisy, "training step", "nats", "KL to the reference", hlines={"before": 0.0, "bound": 2.0})
    (axes,) = drawn[-1].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "nats")
    assert axes.get_title("left") == "KL to the reference"
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == [*noisy, "before", "bound"]
    np.testing.assert_array_equal(axes.lines[2].get_ydata(), noisy["beta 0.3"][1])
    assert [line.get_color() for line in axes.lines[:5]] == list(COLORS[:5])
    assert list(axes.lines[6].get_ydata()) == [2.0, 2.0]
    assert path.stat().st_size < 60_000
    height, width = matplotlib.image.imread(path).shape[:2]
    assert (width, height) == (840, 456)


def test_a_short_legend_stands_inside(tmp_path, drawn):
    curves(tmp_path / "a.png", {"loss": ([1, 2], [3.0, 1.0])}, "x", "y", "t", hlines={"bound": 0.5})
    assert [text.get_text() for text in drawn[-1].axes[0].get_legend().get_texts()] == ["loss", "bound"]
    assert not drawn[-1].legends


def test_one_curve_needs_no_legend_and_few_points_are_marked(tmp_path, drawn):
    curves(tmp_path / "a.png", {"loss": ([1, 10, 100], [3.0, math.nan, 1.0])}, "x", "y", "t", xlog=True)
    (axes,) = drawn[-1].axes
    assert axes.get_legend() is None
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({}, "at least one curve"),
        ({"loss": ([1, 2], [0.5])}, "'loss' must have as many x as y, some finite, got 2 x, 1 y"),
        ({"kl": ([1, 2], [math.nan, math.nan])}, "'kl' must have"),
    ],
)
def test_a_plot_of_nothing_is_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        curves(tmp_path / "a.png", lines, "x", "y", "t")
    assert not list(tmp_path.iterdir())
