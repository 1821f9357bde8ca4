"""Races: sides that take turns, and the command that starts benchmarks."""

import json
import sys

import pytest

from benchmarks import timing
from benchmarks.__main__ import benchmarks, main

SIDE = (
    "from benchmarks import timing; timing.report_seconds({seconds}, packages=('numpy',), compile_seconds={compiling})"
)


def side(seconds, compiling=0.0):
    return [sys.executable, "-c", SIDE.format(seconds=seconds, compiling=compiling)]


def test_a_program_is_run_once_to_warm_up_and_then_timed(capsys):
    calls = []
    timing.report(lambda: calls.append(1), repeats=4, packages=("numpy",))
    printed = json.loads(capsys.readouterr().out)
    assert len(calls) == 5
    assert len(printed["seconds"]) == 4
    assert all(second >= 0 for second in printed["seconds"])
    assert printed["peak_megabytes"] > 1
    assert set(printed["versions"]) == {"numpy"}


def test_a_race_gives_medians_rates_and_ratios_to_the_first():
    sides = {"ours": side([1.0, 2.0, 9.0], 5.0), "theirs": side([8.0, 8.0, 8.0])}
    figures = timing.race(sides, work={"ours": 100, "theirs": 200}, rounds=2)
    assert figures["ours"]["rate"] == 50
    assert figures["theirs"]["rate"] == 25
    assert figures["ours"]["ratio"] == 1
    assert figures["theirs"]["ratio"] == 2
    assert figures["ours"]["timed_runs"] == 6
    assert figures["ours"]["low"] <= figures["ours"]["seconds"] <= figures["ours"]["high"]
    assert figures["ours"]["compile_seconds"] == 5
    assert "| theirs | 25 | 2.00 × | 8 (8 to 8) | 0 |" in timing.table(figures, "steps / s")


def test_a_side_that_fails_is_named_with_what_it_said():
    broken = [sys.executable, "-c", "raise RuntimeError('no such peer')"]
    with pytest.raises(SystemExit, match=r"(?s)theirs failed.*no such peer"):
        timing.race({"theirs": broken}, work={"theirs": 1}, rounds=1)


def test_the_limits_of_the_machine_are_positive():
    assert min(timing.limits().values()) > 0


def test_every_benchmark_is_listed_with_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    main()
    printed = capsys.readouterr().out
    for name, what in benchmarks().items():
        assert f"  {name} " in printed
        assert what in printed
    assert {"ppo_speed", "gpt2_speed", "trl_speed", "scaling", "gpu_speed", "control"} <= set(benchmarks())
    assert not {"timing", "results", "plots", "__main__"} & set(benchmarks())


def test_a_benchmark_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit, match=r"no benchmark 'nothing'; there are .*ppo_speed"):
        main()


def test_a_benchmark_for_accelerators_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu_speed"])
    main()
    assert "found only a CPU: nothing was measured" in capsys.readouterr().out
