import dataclasses
import json
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrl_llm.recipes import loop
from jaxrl_llm.recipes.loop import EarlyStopping, training_loop
from jaxrl_llm.recipes.options import RunOptions
from jaxrl_llm.training import checkpoints
from tests.recipes.runs import curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    rate: float = 1.0


@pytest.fixture
def config(tmp_path):
    return Config(output_dir=str(tmp_path / "run"), logging_steps=2, eval_steps=4, save_steps=3, save_total_limit=9)


def run(config, total_steps=8, **changes):
    """Each state is that before it, times two, plus the index: what came before never washes out."""
    config = dataclasses.replace(config, **changes)

    def update(state, index):
        return 2 * state + index, {"loss": state}

    def evaluate(state):
        return {"eval_loss": -state}

    state, complete = training_loop(
        config, jnp.float32(1), update, total_steps=total_steps, label="test", evaluate=evaluate
    )
    return float(state), complete


def saved_steps(config):
    return sorted(int(path.name) for path in Path(config.output_dir, "checkpoints").iterdir())


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


RESULT = 2.0**8 + sum(index * 2 ** (7 - index) for index in range(8))


def test_metrics_evaluations_and_checkpoints_come_when_they_should(config):
    assert run(config) == (RESULT, True)
    lines = curve(config.output_dir)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8]
    assert lines[-1] == {"step": 8, "loss": (RESULT - 7) / 2, "eval_loss": -RESULT}
    assert saved_steps(config) == [3, 6, 8]
    settings = json.loads(Path(config.output_dir, "config.json").read_text())
    assert (settings["rate"], settings["save_steps"]) == (1.0, 3)


def test_the_last_step_is_logged_evaluated_and_saved_wherever_it_falls(config):
    run(config, total_steps=5)
    assert [line["step"] for line in curve(config.output_dir)] == [0, 2, 4, 5]
    assert "eval_loss" in curve(config.output_dir)[-1]
    assert saved_steps(config) == [3, 5]


@pytest.mark.parametrize("place", ["update", "evaluate", "log", "save"])
def test_ctrl_c_at_any_point_saves_and_the_resumed_run_is_the_same(config, tmp_path, place, monkeypatch, capsys):
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    run(whole)
    calls = {"count": 0}

    def pressing(function):
        def wrapped(*args, **options):
            calls["count"] += 1
            if calls["count"] == 2:
                press_ctrl_c()
            return function(*args, **options)

        return wrapped

    with monkeypatch.context() as patch:
        if place == "log":
            patch.setattr(loop.RunLogger, "log", pressing(loop.RunLogger.log))
        elif place == "save":
            patch.setattr(checkpoints, "save", pressing(checkpoints.save))
        functions = {
            "update": lambda state, index: (2 * state + index, {"loss": state}),
            "evaluate": lambda state: {"eval_loss": -state},
        }
        if place in functions:
            functions[place] = pressing(functions[place])
        _, complete = training_loop(
            config,
            jnp.float32(1),
            functions["update"],
            total_steps=8,
            label="test",
            evaluate=functions["evaluate"],
        )
    printed = capsys.readouterr()
    stopped = {"update": 2, "evaluate": 4, "log": 2, "save": 6}[place]
    assert not complete
    assert f"Stopped after step {stopped} of 8; --resume goes on from here." in printed.out
    assert "Press Ctrl-C once more to quit at once" in printed.err
    assert checkpoints.latest_step(Path(config.output_dir, "checkpoints")) == stopped
    assert run(config, resume=True) == (RESULT, True)
    assert curve(config.output_dir) == curve(whole.output_dir)


def test_a_run_stopped_before_its_first_step_starts_afresh(config, monkeypatch):
    with monkeypatch.context() as patch:
        log = loop.RunLogger.log
        patch.setattr(loop.RunLogger, "log", lambda *args: (log(*args), press_ctrl_c()))
        assert run(config) == (1.0, False)
    assert run(config, resume=True) == (RESULT, True)


def test_resume_without_a_checkpoint_starts_afresh(config):
    assert run(config, resume=True) == (RESULT, True)
    assert [line["step"] for line in curve(config.output_dir)] == [0, 2, 4, 6, 8]


def test_resume_of_a_complete_run_changes_nothing(config):
    run(config)
    before = curve(config.output_dir)
    assert run(config, resume=True) == (RESULT, True)
    assert curve(config.output_dir) == before


def test_resume_with_another_option_says_which(config, capsys):
    run(config, total_steps=3)
    capsys.readouterr()
    run(config, total_steps=8, resume=True, rate=0.5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "another option" in line]
    assert lines == ["Resumed with another option: rate: 1.0 in the saved run, 0.5 now"]


def test_a_new_run_in_a_used_folder_is_refused_and_leaves_it_as_it_was(config):
    run(config)
    before = curve(config.output_dir)
    with pytest.raises(FileExistsError, match=r"already holds a run .*resume it, name another folder, or overwrite it"):
        run(config)
    assert curve(config.output_dir) == before
    assert saved_steps(config) == [3, 6, 8]


def test_overwrite_replaces_the_run_of_a_folder(config):
    run(config)
    run(config, total_steps=2, overwrite=True)
    assert [line["step"] for line in curve(config.output_dir)] == [0, 2]
    assert saved_steps(config) == [2]
    assert len(list(Path(config.output_dir).glob("events.out.tfevents.*"))) == 1


def test_only_the_newest_checkpoints_are_kept(config):
    run(config, save_steps=1, save_total_limit=3)
    assert saved_steps(config) == [6, 7, 8]


def test_without_an_evaluation_nothing_is_evaluated(config):
    update = lambda state, index: (state, {"loss": state})  # noqa: E731
    training_loop(config, jnp.float32(1), update, total_steps=2, label="test")
    assert curve(config.output_dir) == [{"step": 2, "loss": 1.0}]


def read_samples(config):
    return [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text("utf-8").splitlines()]


def test_samples_are_written_where_evaluations_are_and_a_resumed_run_writes_each_once(config, monkeypatch):
    def sampled(**changes):
        return training_loop(
            dataclasses.replace(config, **changes),
            jnp.float32(1),
            lambda state, index: (2 * state + index, {"loss": state}),
            total_steps=8,
            label="test",
            evaluate=lambda state: {"eval_loss": state},
            sample=lambda state, step: [{"prompt": "诗", "completion": f"{float(state):g}"}] * 2,
        )

    sampled(output_dir=config.output_dir + "-whole")
    whole = read_samples(dataclasses.replace(config, output_dir=config.output_dir + "-whole"))
    assert [row["step"] for row in whole] == [0, 0, 4, 4, 8, 8]
    assert whole[-1] == {"step": 8, "prompt": "诗", "completion": f"{RESULT:g}"}
    with monkeypatch.context() as patch:
        log = loop.RunLogger.log
        patch.setattr(loop.RunLogger, "log", lambda *args: (log(*args), args[1] == 6 and press_ctrl_c()))
        sampled()
    assert [row["step"] for row in read_samples(config)] == [0, 0, 4, 4]
    sampled(resume=True)
    assert read_samples(config) == whole


def stopped_early(config, losses, kept, patience=2, **changes):
    """The state counts steps; the loss of an evaluation is that listed for its step."""
    return training_loop(
        dataclasses.replace(config, eval_steps=1, save_steps=1, **changes),
        jnp.int32(0),
        lambda state, index: (state + 1, {"loss": state}),
        total_steps=len(losses) - 1,
        label="test",
        evaluate=lambda state: {"eval_loss": losses[int(state)]},
        early_stopping=EarlyStopping("eval_loss", patience, lambda state: kept.append(int(state))),
    )


@pytest.mark.parametrize(
    ("losses", "end", "best"),
    [
        ([5, 4, 3, 3.5, 3, 2, 1], 4, [0, 1, 2]),  # as low as the best is not lower
        ([5, 4, 4.5, 3, 3.5, 3.2, 1], 5, [0, 1, 3]),
        ([1, 2, 3, 0], 2, [0]),  # nothing was learned: the model of the start is the best
        ([3, 2, 1], 2, [0, 1, 2]),
        ([3, 2, 4, 1], 3, [0, 1, 3]),
        ([float("nan"), 4, 3], 2, [0, 1, 2]),
    ],
)
def test_a_run_ends_when_patience_is_over_and_every_new_best_is_kept(config, losses, end, best, capsys):
    kept = []
    assert stopped_early(config, losses, kept) == (end, True)
    assert kept == best
    assert [line["step"] for line in curve(config.output_dir)] == list(range(end + 1))
    assert saved_steps(config)[-1] == end
    said = f"Ended at step {end} of {len(losses) - 1}: no better evaluation for 2 times." in capsys.readouterr().out
    assert said == (end < len(losses) - 1)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config, tmp_path, step, monkeypatch):
    losses, whole = [5, 4, 3, 3.5, 3.2, 0], dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    stopped_early(whole, losses, [])
    kept = []
    with monkeypatch.context() as patch:
        log = loop.RunLogger.log
        patch.setattr(loop.RunLogger, "log", lambda *args: (log(*args), args[1] == step and press_ctrl_c()))
        stopped_early(config, losses, kept)
    assert stopped_early(config, losses, kept, resume=True) == (4, True)
    assert stopped_early(config, losses, kept, resume=True) == (4, True)  # and once more changes nothing
    assert kept == [0, 1, 2]
    assert curve(config.output_dir) == curve(whole.output_dir)
