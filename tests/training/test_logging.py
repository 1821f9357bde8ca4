import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxrl_llm.training.logging import RunLogger, config_differences, interruptible, read_metrics


def lines_without_time(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def read_events(folder):
    """Parses TensorBoard's record files: length, its checksum, data, its checksum."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_a_run_writes_its_config_metrics_and_tensorboard_events(tmp_path):
    folder = tmp_path / "runs" / "sft"
    with RunLogger(folder, config={"learning_rate": 1e-3, "name": "词典"}) as logger:
        logger.log(1, {"loss": jnp.float32(2.5), "tokens": np.int64(12)})
        logger.log(2, {"loss": 1.5})
    assert json.loads((folder / "config.json").read_text("utf-8")) == {"learning_rate": 1e-3, "name": "词典"}
    first, second = read_metrics(folder)
    assert (first["step"], first["loss"], first["tokens"]) == (1, 2.5, 12)
    assert (second["step"], second["loss"]) == (2, 1.5)
    assert 0 <= second["time"] - first["time"] < 60
    scalars = {(e.step, v.tag): v.simple_value for e in read_events(folder) for v in e.summary.value}
    assert scalars == {(1, "loss"): 2.5, (1, "tokens"): 12.0, (2, "loss"): 1.5}


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        logger.log(1, {"loss": 2.0})
        assert read_metrics(tmp_path)[0]["loss"] == 2.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (jnp.float32(0.1), "0.1"),
        (0.1, "0.1"),
        (np.float32(1e-8), "1e-08"),
        (jnp.bfloat16(0.5), "0.5"),
        (jnp.int32(3), "3"),
        (True, "true"),
        (jnp.float32(jnp.nan), '"NaN"'),
        (np.inf, '"Infinity"'),
        (-np.inf, '"-Infinity"'),
    ],
)
def test_numbers_are_written_at_their_own_precision_as_valid_json(tmp_path, value, text):
    with RunLogger(tmp_path, config={}) as logger:
        logger.log(1, {"metric": value})
    assert f'"metric": {text}' in (tmp_path / "metrics.jsonl").read_text()
    read = read_metrics(tmp_path)[0]["metric"]
    np.testing.assert_array_equal(np.asarray(read).astype(np.asarray(value).dtype), np.asarray(value))


def test_every_float32_is_read_back_bit_for_bit(tmp_path):
    values = np.asarray(jax.random.bits(jax.random.key(0), (200,), "uint32")).view(np.float32)
    values = values[np.isfinite(values)]
    with RunLogger(tmp_path, config={}) as logger:
        logger.log(0, {str(i): value for i, value in enumerate(values)})
    record = read_metrics(tmp_path)[0]
    assert [np.float32(record[str(i)]).tobytes() for i in range(len(values))] == [v.tobytes() for v in values]


def test_a_resumed_run_leaves_the_metrics_of_an_uninterrupted_one(tmp_path):
    def run(folder, steps, **options):
        with RunLogger(folder, config={"seed": 0}, **options) as logger:
            for step in steps:
                logger.log(step, {"loss": 1.0 / step})
                if step % 2 == 0:
                    logger.log(step, {"eval/loss": 2.0 / step})

    run(tmp_path / "whole", range(1, 9))
    run(tmp_path / "resumed", range(1, 7))
    run(tmp_path / "resumed", range(5, 9), resume_step=4)
    assert lines_without_time(tmp_path / "resumed") == lines_without_time(tmp_path / "whole")
    purged = [event.step for event in read_events(tmp_path / "resumed") if event.HasField("session_log")]
    assert purged == [5]


def test_an_unfinished_last_line_is_ignored_and_cut_on_resume(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        logger.log(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    with RunLogger(tmp_path, config={}, resume_step=1) as logger:
        logger.log(2, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_line_separator_inside_a_name_does_not_split_the_line(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        logger.log(1, {"a\u2028b\nc": 1.0})
    assert read_metrics(tmp_path)[0]["a\u2028b\nc"] == 1.0


def test_a_resumed_run_reports_which_options_differ_and_keeps_the_new_ones(tmp_path):
    saved = {"seed": 0, "data": Path("a.jsonl"), "model": {"layers": 4, "heads": 2}, "betas": (0.9, 0.95)}
    now = {"seed": 0, "data": Path("b.jsonl"), "model": {"layers": 6, "heads": 2}, "betas": (0.9, 0.95), "new": None}
    with RunLogger(tmp_path, config=saved) as logger:
        assert logger.config_differences == []
        assert logger.config == {**saved, "data": "a.jsonl", "betas": [0.9, 0.95]}
    with RunLogger(tmp_path, config=now, resume_step=0) as logger:
        assert logger.config_differences == [
            "data: a.jsonl in the saved run, b.jsonl now",
            "model.layers: 4 in the saved run, 6 now",
            "new: absent in the saved run, None now",
        ]
    assert json.loads((tmp_path / "config.json").read_text())["model"] == {"layers": 6, "heads": 2}


def test_a_function_among_the_options_is_compared_by_its_name():
    assert config_differences({"reward": lines_without_time}, {"reward": lines_without_time.__qualname__}) == []


def test_a_run_can_be_resumed_in_a_folder_that_has_only_its_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with RunLogger(tmp_path, config={}, resume_step=3) as logger:
        logger.log(4, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [4]


def test_a_new_run_never_overwrites_another_unless_told(tmp_path):
    with RunLogger(tmp_path, config={"seed": 0}) as logger:
        logger.log(1, {"loss": 1.0})
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds a run \(it has config.json\): resume it"):
        RunLogger(tmp_path, config={"seed": 1})
    assert read_metrics(tmp_path)[0]["loss"] == 1.0
    with RunLogger(tmp_path, config={"seed": 1}, overwrite=True):
        pass
    assert read_metrics(tmp_path) == []
    assert [event.step for event in read_events(tmp_path) if event.summary.value] == []
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_metrics_that_are_not_scalars_are_refused_by_name(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        with pytest.raises(ValueError, match=r"metric 'loss' must be a scalar, got shape \(3,\)"):
            logger.log(1, {"loss": jnp.ones(3)})
        with pytest.raises(TypeError, match="metric 'note' must be a real number, got 'good'"):
            logger.log(1, {"note": "good"})
        with pytest.raises(ValueError, match=r"got \['time'\]"):
            logger.log(1, {"time": 1.0})
    assert read_metrics(tmp_path) == []


def test_reading_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no metrics\.jsonl"):
        read_metrics(tmp_path)
    for line, problem in (("not json", "is not a line"), ("[1]", "is not a line"), ('{"loss": 1}', "has no step")):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=f"Line 2 of .*{problem}"):
            read_metrics(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_old_handler_returns(signum, capsys):
    old = signal.getsignal(signum)
    with interruptible() as interrupt:
        assert not interrupt.stop
        os.kill(os.getpid(), signum)
        assert interrupt.stop
    assert signal.getsignal(signum) is old
    assert "Stopping after this step, then saving" in capsys.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_the_first_signal_raises_keyboard_interrupt(first):
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupt:  # noqa: PT012
        os.kill(os.getpid(), first)
        assert interrupt.stop
        os.kill(os.getpid(), signal.SIGINT)


def test_a_repeated_sigterm_does_not_disturb_the_saving(capsys):
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.stop
    assert capsys.readouterr().err.count("Stopping") == 1


def test_a_closed_stderr_does_not_keep_a_run_from_stopping_cleanly(monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with interruptible() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.stop


def test_a_signal_that_was_ignored_stays_ignored():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.stop
    finally:
        signal.signal(signal.SIGINT, old)


def test_outside_the_main_thread_nothing_is_changed():
    handlers = []

    def body():
        with interruptible() as interrupt:
            handlers.append((signal.getsignal(signal.SIGINT), interrupt.stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [(signal.getsignal(signal.SIGINT), False)]


INTERRUPTED_RUN = """
import os, signal, sys
from jaxrl_llm.training import checkpoints
from jaxrl_llm.training.logging import RunLogger, interruptible

with RunLogger(sys.argv[1], config={}) as logger, interruptible() as interrupt:
    step = 0
    while step < 10 and not interrupt.stop:
        step += 1
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        logger.log(step, {"loss": 1.0 / step})
    checkpoints.save(sys.argv[1] + "/checkpoints", step, {"step": step})
"""


def test_a_terminated_run_finishes_its_step_saves_and_exits_cleanly(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED_RUN, str(tmp_path)]
    done = subprocess.run(command, env=os.environ, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().startswith("Stopping after this step")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_an_error_inside_the_run_still_closes_its_files(tmp_path):
    with pytest.raises(RuntimeError, match="diverged"), RunLogger(tmp_path, config={}) as logger:  # noqa: PT012
        logger.log(1, {"loss": math.nan})
        raise RuntimeError("diverged")
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])
    with pytest.raises(ValueError, match="closed file"):
        logger.log(2, {"loss": 1.0})


def test_samples_are_lines_of_json_with_their_step_in_any_language(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        logger.log_samples(0, [])
        assert (tmp_path / "samples.jsonl").read_text() == ""
        logger.log_samples(10, [{"prompt": "床前明月光", "completion": "a\nb"}, {"prompt": "", "completion": ""}])
        logger.log_samples(20, [{"prompt": "x", "completion": "y"}])
    text = (tmp_path / "samples.jsonl").read_text("utf-8")
    assert text.splitlines()[0] == '{"step": 10, "prompt": "床前明月光", "completion": "a\\nb"}'
    assert [json.loads(line)["step"] for line in text.splitlines()] == [10, 10, 20]


def test_a_resumed_run_drops_samples_later_than_its_checkpoint_and_a_new_one_all(tmp_path):
    with RunLogger(tmp_path, config={}) as logger:
        for step in (0, 10, 20):
            logger.log_samples(step, [{"completion": str(step)}])
    with RunLogger(tmp_path, config={}, resume_step=10):
        pass
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [0, 10]
    with RunLogger(tmp_path, config={}, overwrite=True):
        pass
    assert not (tmp_path / "samples.jsonl").exists()
