"""Two real processes with four devices each: the run of one process, each reading its own rows; and the loss of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.runs import TINY, assert_close_weights, curve, words, write_rows
from tests.recipes.test_mesh import ROWS

SETTINGS = {
    "eval_fraction": 0.25,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}
COUNTED = """
import sys
from jaxrl_llm import cli
read = []
def counted(rows, **options):
    read.append(len(rows))
    return collate(rows, **options)
import jaxrl_llm.data as data
collate, data.collate_sft = data.collate_sft, counted
cli.main(sys.argv[1:])
print("rows read:", read[-1])
"""


def start(processes, arguments, log, script=None):
    """Starts a command as so many processes of four devices, each with a file for what it says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *(("-m", "jaxrl_llm.cli") if script is None else ("-c", script)), *arguments]
    started = []
    for index in range(processes):
        env = os.environ | {
            "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type= --xla_force_host_platform_device_count=4"
        }
        if processes > 1:
            env |= {
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
                "JAX_COORDINATOR_ADDRESS": address,
            }
        with open(f"{log}_{index}.txt", "w") as file:
            started.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
    return started


def said_by(log, index):
    return Path(f"{log}_{index}.txt")


def finish(started, log):
    for index, process in enumerate(started):
        said = said_by(log, index)
        assert process.wait(timeout=240) == 0, said.read_text()[-3000:]
    return [said_by(log, index).read_text() for index in range(len(started))]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "dpo", "grpo"])
def test_two_processes_train_as_one_does(recipe, tmp_path):
    rows = ROWS if recipe != "grpo" else [{"prompt": row["prompt"], "answer": "7"} for row in ROWS]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"learning_rate": 0.1, "max_steps": 3, "eval_steps": 2, "save_steps": 2, "dataset": dataset}
    if recipe == "grpo":
        rewards = (
            "def sevens(prompts, completions, **_):\n    return [float(text.count('7')) for text in completions]\n"
        )
        (tmp_path / "rewards.py").write_text(rewards)
        settings |= {"num_prompts": 8, "num_generations": 2, "max_completion_length": 4}
        settings |= {"reward_funcs": f"{tmp_path}/rewards.py:sevens"}
    shared = [recipe, *words(**TINY | SETTINGS | settings | ({"warmup_steps": 0} if recipe == "sft" else {}))]
    sizes = (["--per-device-train-batch-size", "8"], ["--per-device-train-batch-size", "1"])
    one, two = ([] if recipe == "grpo" else size for size in sizes)
    mesh = ["--mesh", "data=4,fsdp=2"]
    finish(start(1, [*shared, *one, "--output-dir", f"{tmp_path}/one"], tmp_path / "one_says"), tmp_path / "one_says")
    script = COUNTED if recipe == "sft" else None
    log = tmp_path / "two_say"
    said = finish(start(2, [*shared, *two, *mesh, "--output-dir", f"{tmp_path}/two"], log, script), log)
    assert "eval_" in said[0]
    assert "Result" not in said[1], "the second process prints nothing of its own"
    if script is not None:
        assert all("rows read: 4" in text for text in said), "each reads its half of the 8 rows of a step"
    for ours, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5)


@pytest.mark.slow
def test_the_loss_of_a_process_ends_the_other_with_an_error_and_the_run_can_be_resumed(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    steps = {"max_steps": 300, "eval_steps": 300, "save_steps": 5, "num_samples": 0, "logging_steps": 5}
    settings = TINY | SETTINGS | steps | {"learning_rate": 0.01, "warmup_steps": 0, "dataset": dataset}
    shared = ["sft", *words(**settings)]
    log, folder = tmp_path / "two_say", tmp_path / "run"
    mesh = ["--mesh", "data=4,fsdp=2", "--per-device-train-batch-size", "1"]
    started = start(2, [*shared, *mesh, "--output-dir", str(folder)], log)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "10").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGKILL)
    started[1].wait()
    assert started[0].wait(timeout=200) != 0
    assert "another task died" in said_by(log, 0).read_text()
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert saved < 300
    one = ["--per-device-train-batch-size", "8"]
    finish(start(1, [*shared, *one, "--output-dir", str(folder), "--resume"], tmp_path / "again"), tmp_path / "again")
    finish(start(1, [*shared, *one, "--output-dir", f"{tmp_path}/one"], tmp_path / "one_says"), tmp_path / "one_says")
    assert curve(folder)[-1] == pytest.approx(curve(tmp_path / "one")[-1], rel=1e-3)
    assert_close_weights(folder, tmp_path / "one", atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 300


@pytest.mark.parametrize("names", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}])
def test_processes_that_do_not_say_who_they_are_are_refused(names, monkeypatch):
    from jaxrl_llm import cli

    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"needs a whole number .or auto., JAX_COORDINATOR_ADDRESS=host:port"):
        cli.main(["sft"])
