"""What the tests of language recipes share: a tiny model, files of rows, and how runs are stopped and compared."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxrl_llm.recipes import loop

TINY = {
    "tokenizer": "characters:+0123456789=",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 16,
    "initializer_range": 0.1,
}


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def words(**settings):
    """Settings as they are written on a command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def curve(folder):
    """The lines of metrics.jsonl, as they are written (NaN is a string), without their times."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def weights(folder):
    return load_file(Path(folder, "model", "model.safetensors"))


def assert_same_run(left, right):
    """Bit for bit."""
    assert curve(left) == curve(right)
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def assert_close_weights(left, right, atol):
    ours, theirs = weights(left), weights(right)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=atol, err_msg=name)


def assert_complete_folder(folder, steps):
    """A run leaves its settings, metrics, TensorBoard events, checkpoints and model."""
    names = {path.name.partition(".tfevents")[0] for path in Path(folder).iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "events.out", "checkpoints", "model"}
    assert sorted(int(path.name) for path in Path(folder, "checkpoints").iterdir()) == steps
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in Path(folder, "model").iterdir()}


def press_ctrl_c_after(monkeypatch, step):
    """Sends SIGINT to this process when a run logs its step."""
    log = loop.RunLogger.log

    def log_and_press(self, index, metrics):
        log(self, index, metrics)
        if index == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.RunLogger, "log", log_and_press)


def renamed(config, name, **changes):
    """The settings of a run with changes, in a folder of their own beside its folder."""
    return dataclasses.replace(config, output_dir=str(Path(config.output_dir).with_name(name)), **changes)


def token_log_probs(model, params, rows):
    """Log-probability of each token but the first of each row under the model, one row at a time, in float64.

    The padding to one length, behind the rows, is what no token looks at.
    """
    logits_of = jax.jit(lambda params, tokens: model.module.apply({"params": params}, tokens)[0])
    everything = []
    for ids in rows:
        padded = np.pad(ids[:-1], (0, model.context_length + 1 - len(ids)))[None]
        logits = np.asarray(logits_of(params, padded)[0], np.float64)[: len(ids) - 1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        everything.append(log_probs[np.arange(len(ids) - 1), ids[1:]])
    return everything
