import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm.recipes import progress
from jaxrl_llm.recipes.progress import Progress, facts, format_number, table


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def file_console(width=100):
    return Console(file=io.StringIO(), width=width)


def terminal_console():
    return Console(file=io.StringIO(), width=120, force_terminal=True, _environ={"TERM": "xterm-256color"})


def test_into_a_file_progress_is_plain_lines_without_control_characters():
    console = file_console()
    with Progress(10, "sft", show=("loss",), every=0.0, console=console) as bar:
        for step in range(1, 11):
            bar.update(step, {"loss": 1.0 / step, "other": 3.0})
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert "\x1b" not in console.file.getvalue()
    assert lines[0] == "sft  1/10 (10%)  loss 1"
    assert re.fullmatch(r"sft  5/10 \(50%\)  \S+ steps/s  ETA 0:00  loss 0.2", lines[4])
    assert re.fullmatch(r"sft  10/10 \(100%\)  \S+ steps/s  loss 0.1", lines[9])


def test_lines_are_rare_but_the_first_and_the_last_are_always_there():
    console = file_console()
    with Progress(100, "sft", every=1000.0, console=console) as bar:
        for step in range(1, 51):
            bar.update(step, {"loss": 1.0})
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["1/100 (1%)", "50/100 (50%)"]


def test_rate_and_remaining_time_leave_out_compilation_and_the_steps_before_a_resume(clock):
    console = file_console()
    with Progress(1000, "sft", start=500, every=0, console=console) as bar:
        for now, step, tokens in ((60.0, 510, 99_999), (62.0, 520, 4_000), (64.0, 530, 4_000)):
            clock.now = now
            bar.update(step, tokens=tokens)
            assert bar.rates() == (None if step == 510 else (5.0, 2000.0))
    first, _, last = console.file.getvalue().splitlines()
    assert first == "sft  510/1,000 (51%)"
    assert last == "sft  530/1,000 (53%)  5 steps/s  2k tokens/s  ETA 1:34"


def test_the_rate_forgets_what_is_older_than_its_window(clock):
    bar = Progress(10_000, "sft", console=terminal_console())
    for clock.now in range(100):
        slow = clock.now < 50
        bar.update(clock.now if slow else 50 + 10 * (clock.now - 50))
    assert bar.rates() == (10.0, 0.0)


def test_on_a_terminal_one_line_is_redrawn_with_a_bar():
    console = terminal_console()
    with Progress(4, "dpo", console=console) as bar:
        for step in range(1, 5):
            bar.update(step, {"loss": jnp.float32(0.5)})
    output = console.file.getvalue()
    assert "\x1b[" in output
    assert "━" in output
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).strip().splitlines()[-1]
    assert last.split()[0] == "dpo"
    assert "4/4 (100%)" in last
    assert "loss 0.5" in last


def test_metrics_keep_their_last_value_and_the_first_three_are_shown_by_default():
    bar = Progress(10, "grpo", console=file_console())
    bar.update(1, {"a": 1.0, "b": np.float32(2.5), "c": 3, "d": 4})
    bar.update(2, {"a": 7.0})
    bar.update(3)
    assert str(bar).endswith("a 7  b 2.5  c 3")


def test_a_run_needs_at_least_one_step():
    with pytest.raises(ValueError, match="total must be at least 1 step, got 0"):
        Progress(0, "sft")


def test_a_table_shows_samples_as_they_are():
    console = file_console()
    rows = [["[bold]3+4=[/bold]", 7, 0.44712], ["词典\n第二行", np.float32(1.5), 1234567.0]]
    table("Before [and] after", ["prompt", "n", "reward"], rows, console=console)
    output = console.file.getvalue()
    for text in ("Before [and] after", "[bold]3+4=[/bold]", "词典", "第二行", "0.4471", "1,234,567"):
        assert text in output


def test_a_table_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="row 2 of 'Samples' has 1 cells, but there are 2 columns"):
        table("Samples", ["prompt", "completion"], [["a", "b"], ["c"]])


def test_facts_are_aligned_lines():
    console = file_console()
    facts("SFT", {"parameters": 124_439_808, "data": "train.jsonl"}, console=console)
    assert console.file.getvalue() == "SFT\n  parameters  124,439,808\n  data        train.jsonl\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-3, "-3"), (1.0, "1"), (0.1234567, "0.1235"), (jnp.float32(0.5), "0.5"), (float("inf"), "inf")],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.4218, "0.422"),
        (38.14, "38.1"),
        (999.4, "999"),
        (999.7, "1k"),
        (999_700.0, "1M"),
        (5240.0, "5.24k"),
        (3.1e6, "3.1M"),
    ],
)
def test_rates_are_short(rate, text):
    assert progress._short(rate) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "0:05"), (125, "2:05"), (3725, "1:02:05")])
def test_durations_read_like_a_clock(seconds, text):
    assert progress._duration(seconds) == text
