"""What a run shows in the terminal: a live line of progress, tables, and nothing that breaks a log file.

On a terminal the progress is one line that is redrawn; where the output goes to a file or a pipe, it is a plain line
every few seconds.
"""

import collections
import numbers
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WINDOW_SECONDS = 30.0


class Progress:
    """Shows how far a loop is, how fast, how long it will still take, and a few of its metrics; a context manager.

        with Progress(total=config.max_steps, label="sft", show=("loss", "eval/loss")) as progress:
            for step in range(1, config.max_steps + 1):
                ...
                progress.update(step, metrics, tokens=batch_tokens)

    The rate is that of the last 30 seconds, and counts from the first update, so that compiling does not spoil it.

    Args:
        total: The step at which the loop ends.
        label: What is running, in a word or two.
        show: Names of the metrics to show, in this order; empty shows the first three.
        start: The step to begin from: that of the checkpoint, on a resume.
        unit: What one step is called: "steps" of an optimizer, "frames" of an environment.
        every: Seconds between two lines where the output is not a terminal.
        console: Where to write; None takes standard output.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        show: Sequence[str] = (),
        start: int = 0,
        unit: str = "steps",
        every: int | float = 10.0,
        console: Console | None = None,
    ):
        if total < 1:
            raise ValueError(f"total must be at least 1 step, got {total}.")
        self.total, self.label, self.show, self.unit, self.every = total, label, tuple(show), unit, every
        self.step = start
        self._console = console or Console()
        self._metrics: dict[str, float] = {}
        self._tokens = 0
        self._history: collections.deque[tuple[float, int, int]] = collections.deque()
        self._live = Live(self, console=self._console, refresh_per_second=4)
        self._printed_at, self._printed_step = -float("inf"), start

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, *, tokens: int = 0) -> None:
        """Tells that `step` is finished.

        Args:
            step: Number of finished steps.
            metrics: The newest values by name; those not given keep their last one. Jax numbers are waited for.
            tokens: Tokens processed since the last update; if ever given, tokens per second are shown too.
        """
        self.step = int(step)
        self._tokens += int(tokens)
        names = self.show or [*self._metrics, *(metrics or {})][:3]
        self._metrics |= {name: float(metrics[name]) for name in names if metrics and name in metrics}
        now = time.monotonic()
        self._history.append((now, self.step, self._tokens))
        while len(self._history) > 2 and now - self._history[0][0] > _WINDOW_SECONDS:
            self._history.popleft()
        if not self._console.is_terminal and now - self._printed_at >= self.every:
            self._print_line()

    def rates(self) -> tuple[float, float] | None:
        """Returns steps per second and tokens per second, or None before the second update."""
        if len(self._history) < 2 or self._history[-1][0] <= self._history[0][0]:
            return None
        (t0, step0, tokens0), (t1, step1, tokens1) = self._history[0], self._history[-1]
        return (step1 - step0) / (t1 - t0), (tokens1 - tokens0) / (t1 - t0)

    def __str__(self) -> str:
        return f"{self.label}  {'  '.join(self._facts())}"

    def __rich__(self) -> Table:
        line = Table.grid(padding=(0, 1), expand=False)
        width = 24 if self._console.width >= 110 else 10
        line.add_row(
            Text(self.label, "bold"),
            ProgressBar(total=self.total, completed=min(self.step, self.total), width=width),
            Text("  ".join(self._facts()), overflow="fold"),
        )
        return line

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        elif self.step > self._printed_step:
            self._print_line()

    def _print_line(self) -> None:
        self._console.print(Text(str(self)), soft_wrap=True)
        self._printed_at, self._printed_step = time.monotonic(), self.step

    def _facts(self) -> list[str]:
        facts = [f"{self.step:,}/{self.total:,} ({100 * self.step // self.total}%)"]
        if rates := self.rates():
            steps_rate, tokens_rate = rates
            facts.append(f"{_short(steps_rate)} {self.unit}/s")
            facts += [f"{_short(tokens_rate)} tokens/s"] if tokens_rate else []
            if steps_rate > 0 and self.step < self.total:
                facts.append(f"ETA {_duration((self.total - self.step) / steps_rate)}")
        return facts + [f"{name} {format_number(value)}" for name, value in self._metrics.items()]


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    console: Console | None = None,
) -> None:
    """Prints a table; numbers are shortened and set right, text is shown as it is (markup is not interpreted).

    Raises:
        ValueError: A row has not as many cells as there are columns.
    """
    rows = [list(row) for row in rows]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} of {title!r} has {len(row)} cells, but there are {len(columns)} columns.")
    grid = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(is_number(row[index]) for row in rows)
        grid.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(format_cell(cell)) for cell in row))
    (console or first_console()).print(grid)


def first_console() -> Console:
    """Makes a console that prints in the first of several processes alone."""
    return Console(quiet=jax.process_index() > 0)


def facts(title: str, values: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Prints a heading and `name  value` lines: what a run is about to do, or what it has done."""
    console = console or first_console()
    console.print(Text(title, "bold"))
    width = max(map(len, values), default=0)
    for name, value in values.items():
        console.print(Text.assemble("  ", (name.ljust(width), "dim"), "  ", format_cell(value)), soft_wrap=True)


def format_number(value: Any) -> str:
    """Formats a number for reading: whole numbers with commas, others with four significant digits.

    Example:
        >>> [format_number(x) for x in (1234567, 0.00001234, 2.5, 1234.5, float("nan"))]
        ['1,234,567', '1.234e-05', '2.5', '1,234', 'nan']
    """
    number = float(value)
    if number.is_integer() and abs(number) < 1e15:
        return f"{int(value):,}"
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e15 else f"{number:.4g}"


def is_number(cell: Any) -> bool:
    """Tells whether a cell of a table holds a number (Python's or numpy's; truth values are text)."""
    return isinstance(cell, numbers.Real) and not isinstance(cell, bool)


def format_cell(cell: Any) -> str:
    """Formats a cell of a table: a number by `format_number`, anything else as its text."""
    return format_number(cell) if is_number(cell) else str(cell)


def _short(rate: int | float) -> str:
    """Formats a rate with three digits: 0.42, 38.1, 5.2k, 3.1M."""
    for divisor, suffix in ((1, ""), (1e3, "k")):
        if rate < 999.5 * divisor:
            return f"{rate / divisor:.3g}{suffix}"
    return f"{rate / 1e6:.3g}M"


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
