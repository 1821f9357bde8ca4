import base64
import html.parser
import math
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxrl_llm.recipes import report
from jaxrl_llm.recipes.report import ReportTable, Section, plot_metrics, write_report
from jaxrl_llm.training.logging import RunLogger


@pytest.fixture
def run(tmp_path):
    with RunLogger(tmp_path / "run", config={}) as logger:
        for step in range(1, 101):
            logger.log(step, {"loss": 3.0 / step + 0.1 * (-1) ** step, "kl": math.nan if step == 50 else 0.01 * step})
            if step % 10 == 0:
                logger.log(step, {"eval/loss": 3.0 / step})
    return tmp_path / "run"


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))[1])
    return figures


def test_a_plot_has_a_panel_per_title_with_labelled_axes_and_a_legend(run, tmp_path, drawn):
    plot_metrics(
        run, {"Loss (nats per token)": ["loss", "eval/loss"], "KL": ["kl"]}, tmp_path / "metrics.png", x_label="frame"
    )
    upper, lower = drawn[0].axes
    assert (upper.get_title("left"), upper.get_xlabel(), upper.get_ylabel()) == ("Loss", "frame", "nats per token")
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["loss", "eval/loss"]
    assert (lower.get_title("left"), lower.get_ylabel(), lower.get_legend()) == ("KL", "kl", None)
    pixels = matplotlib.image.imread(tmp_path / "metrics.png")
    assert pixels.shape[1] > pixels.shape[0] > 600
    assert pixels.std() > 0.01


def test_curves_are_those_of_the_run_and_nan_leaves_a_gap(run, tmp_path, drawn):
    plot_metrics(run, {"Loss": ["eval/loss"], "KL": ["kl"]}, tmp_path / "metrics.png")
    loss, kl = drawn[0].axes
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), range(10, 101, 10))
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [3.0 / step for step in range(10, 101, 10)])
    raw, smooth = kl.lines
    assert np.flatnonzero(np.isnan(raw.get_ydata())).tolist() == [49]
    assert np.isfinite(smooth.get_ydata()).all()


def test_the_running_mean_is_centred_and_leaves_out_nan():
    values = [1.0, 3.0, math.nan, 5.0, 9.0]
    np.testing.assert_array_equal(report._running_mean(values, 3), [2.0, 2.0, 4.0, 7.0, 7.0])
    np.testing.assert_array_equal(report._running_mean([math.nan, 2.0], 1), [math.nan, 2.0])


def test_an_unknown_metric_is_an_error_with_the_nearest_name(run, tmp_path):
    with pytest.raises(ValueError, match=r"'eval_loss' was never logged in .*: did you mean 'eval/loss'\?"):
        plot_metrics(run, {"Loss": ["eval_loss"]}, tmp_path / "metrics.png")
    with pytest.raises(ValueError, match=r"'zzz' was never logged in .*: there are \['eval/loss', 'kl', 'loss'\]"):
        plot_metrics(run, {"Loss": ["zzz"]}, tmp_path / "metrics.png")
    with pytest.raises(ValueError, match="panels must name at least one metric"):
        plot_metrics(run, {}, tmp_path / "metrics.png")
    assert not (tmp_path / "metrics.png").exists()


class Outline(html.parser.HTMLParser):
    """Collects the tags, the text of each, and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_report_is_one_self_contained_page_with_its_images_inside(run, tmp_path):
    plot_metrics(run, {"Loss": ["loss"]}, tmp_path / "metrics.png")
    scores = ReportTable(["", "before", "after"], [["accuracy", 0.447, 0.777], ["词典", 1, "n/a"]], "Held-out sums")
    write_report(
        tmp_path / "report.html",
        "Quickstart",
        [
            Section("Results", "First paragraph.\n\nSecond\nparagraph.", [scores], [tmp_path / "metrics.png"]),
            Section("Notes"),
        ],
    )
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Outline(text)
    assert [page.tags.count(tag) for tag in ("h1", "h2", "p", "table", "th", "td", "img")] == [1, 2, 2, 1, 3, 6, 1]
    assert {"Quickstart", "Results", "Notes", "Held-out sums", "词典", "0.447", "n/a"} <= set(page.texts)
    prefix, data = page.sources[0].split(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "metrics.png").read_bytes()
    assert not re.search(r"https?://|<script|<link|url\(|@import", text)
    assert 'name="viewport"' in text
    assert "color-scheme: light dark" in text


def test_text_and_samples_are_escaped_and_keep_their_lines(tmp_path):
    hostile = "<script>alert('x')</script> & \"y\"\n  {{ 7 * 7 }}"
    table = ReportTable([hostile], [[hostile]], hostile)
    write_report(tmp_path / "report.html", hostile, [Section(hostile, hostile, [table])])
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Outline(text)
    assert "script" not in page.tags
    assert "49" not in "".join(page.texts)
    assert page.texts.count(hostile) == 7  # Title twice, heading, paragraph, caption, column, cell.


def test_errors_name_the_table_or_the_image(tmp_path):
    table = ReportTable(["a", "b"], [[1, 2], [1]], "Scores")
    with pytest.raises(ValueError, match="row 2 of the table 'Scores' has 1 cells, but there are 2 columns"):
        write_report(tmp_path / "report.html", "Report", [Section("Results", tables=[table])])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_report(tmp_path / "report.html", "Report", [Section("Results", images=[tmp_path / "missing.png"])])
    assert not (tmp_path / "report.html").exists()
