"""What a run writes while it trains, and how it is asked to stop.

A run owns one folder:

    config.json                  the options it was started with
    metrics.jsonl                one JSON object per `log` call: {"step": 100, "time": …, "loss": 2.31, …}
    events.out.tfevents.*        the same numbers for TensorBoard (`tensorboard --logdir runs`)
    checkpoints/                 see `jaxrl_llm.training.checkpoints`

JSON knows no NaN: in metrics.jsonl such numbers are the strings "NaN", "Infinity" and "-Infinity", which `read_metrics`
turns back into floats. TensorBoard gets the finite ones, at most five seconds later.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WRITTEN_BY_A_RUN = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "events.out.tfevents.*",
    "checkpoints",
    "adapter",
)
_STOP_MESSAGE = "\nStopping after this step, then saving. Press Ctrl-C once more to quit at once."


class RunLogger:
    """Writes the config and the metrics of a run; use it as a context manager.

    On a resume, the lines of metrics.jsonl later than the checkpoint are cut away, so that in the end the file equals
    that of an uninterrupted run, the times apart. For this, log a step before saving its checkpoint; and restore before
    making the logger, so that a checkpoint that does not fit leaves the folder as it was.

    Args:
        folder: The folder of this run; it is made if need be.
        config: The options of the run; values that JSON does not know are written as text.
        resume_step: The step of the checkpoint that the run continues from, or None for a new run.
        overwrite: Whether a new run may delete what an older one left in `folder`, its checkpoints included.

    Attributes:
        folder: The folder, as a `Path`.
        config: The options as JSON has them, to be kept in checkpoints too: `save(…, extra={"config": logger.config})`.
        config_differences: On a resume, one line for each option that differs from the run so far.

    Raises:
        FileExistsError: A new run was to start in the folder of another.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with RunLogger(folder, config={"learning_rate": 1e-3}) as logger:
        ...     logger.log(1, {"loss": jnp.float32(0.5)})
        >>> read_metrics(folder)[0]["loss"]
        0.5
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        config: Mapping[str, Any],
        resume_step: int | None = None,
        overwrite: bool = False,
    ):
        from tensorboardX import SummaryWriter

        self.folder = Path(folder)
        self.config = _plain(config)
        self.config_differences: list[str] = []
        if resume_step is None:
            _make_room(self.folder, overwrite)
        else:
            self.config_differences = _compare_with_saved(self.folder, config)
            for name in ("metrics.jsonl", "samples.jsonl"):
                _cut_lines(self.folder / name, resume_step)
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "config.json", json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (see `close`)
        # TensorBoard hides what it was told of steps from `purge_step` on.
        purge_step = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=5)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line of metrics, and flushes it.

        Args:
            step: Number of finished training steps.
            metrics: Scalars by name: Python, numpy or jax numbers. A float is written with the fewest decimals that
                give it back at its own precision. Waits for the jax ones, so log every few steps where steps are
                short.

        Raises:
            ValueError: A metric is not a scalar, or is called `step` or `time`.
            TypeError: A metric is not a real number.
        """
        if reserved := {"step", "time"} & set(metrics):
            raise ValueError(f"metrics must not use the names of the line's own fields, got {sorted(reserved)}.")
        numbers = {name: _number(name, value) for name, value in jax.device_get(dict(metrics)).items()}
        line = {"step": int(step), "time": round(time.time(), 3)}
        line |= {name: _encode(number) for name, number in numbers.items()}
        self._metrics.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._metrics.flush()
        for name, number in numbers.items():
            if math.isfinite(number):  # tensorboardX prints a warning for each that is not.
                self._events.add_scalar(name, number, int(step))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes texts that the model made, one line each with the step, to samples.jsonl."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": int(step), **row}, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        """Closes the files; leaving the `with` block does it."""
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class SilentLogger:
    """A `RunLogger` that writes nothing: of all but the first of several processes."""

    config_differences: Sequence[str] = ()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes nothing."""

    def __enter__(self) -> "SilentLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the metrics.jsonl of a run: one dict per line, with `step`, `time` and the metrics as numbers.

    A last line that a killed process left unfinished is ignored.

    Raises:
        FileNotFoundError: `folder` holds no metrics.jsonl.
        ValueError: A finished line is not a JSON object with a step.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"There is no metrics.jsonl in {folder}: folder must be that of a run.")
    return [{name: _decode(value) for name, value in line.items()} for _, line in _finished_lines(path)]


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compares two configs and returns one line per option that differs; nested options have dotted names.

    Example:
        >>> config_differences({"seed": 0, "model": {"layers": 4}}, {"seed": 0, "model": {"layers": 6}})
        ['model.layers: 4 in the saved run, 6 now']
    """
    before, after = _dotted(_plain(saved)), _dotted(_plain(current))
    names = [name for name in {**before, **after} if before.get(name, "absent") != after.get(name, "absent")]
    return [f"{n}: {before.get(n, 'absent')} in the saved run, {after.get(n, 'absent')} now" for n in names]


class Interrupt:
    """Tells a training loop whether it was asked to stop."""

    stop: bool = False
    """Turns True at the first SIGINT or SIGTERM."""


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a request to stop after the current step.

    The loop looks at `.stop` after each step, saves and leaves. A second Ctrl-C raises KeyboardInterrupt as usual;
    SIGTERM may come several times (schedulers repeat it). The old handlers return at the end. Signals that were
    ignored stay ignored, and outside the main thread, where Python allows no handlers, nothing is changed.

        with interruptible() as interrupt:
            while step < total and not interrupt.stop:
                ...
    """
    interrupt = Interrupt()
    old_handlers = {}

    def ask_to_stop(signum: int, frame: object) -> None:
        if not interrupt.stop:
            # A stderr that is closed, or that was being written to when the signal came, must not keep us from saving.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                print(_STOP_MESSAGE, file=sys.stderr, flush=True)
        interrupt.stop = True
        if signal.SIGINT in old_handlers:
            signal.signal(signal.SIGINT, old_handlers[signal.SIGINT])

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                old_handlers[signum] = signal.signal(signum, ask_to_stop)
    try:
        yield interrupt
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


def require_free(folder: str | os.PathLike) -> None:
    """Raises a `FileExistsError` if the folder holds a run: for what takes long before a logger is made."""
    if found := _written_by_a_run(Path(folder)):
        raise FileExistsError(
            f"{folder} already holds a run (it has {found[0].name}): resume it, name another folder, or overwrite it."
        )


def _written_by_a_run(folder: Path) -> list[Path]:
    return [path for pattern in _WRITTEN_BY_A_RUN for path in sorted(folder.glob(pattern))]


def _make_room(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        require_free(folder)
    for path in _written_by_a_run(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _compare_with_saved(folder: Path, config: Mapping[str, Any]) -> list[str]:
    path = folder / "config.json"
    return config_differences(json.loads(path.read_text("utf-8")), config) if path.is_file() else []


def _cut_lines(path: Path, last_step: int) -> None:
    if path.is_file():
        lines = [line for line, record in _finished_lines(path) if record["step"] <= last_step]
        _replace(path, "".join(lines))


def _finished_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a file, as text and parsed, without an unfinished last one."""
    *lines, _ = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is not a line of JSON: {line[:80]!r}.") from error
        if not isinstance(record, dict):
            raise ValueError(f"Line {number} of {path} is not a line of a run: {line[:80]!r}.")
        if "step" not in record:
            raise ValueError(f"Line {number} of {path} has no step: {line[:80]!r}.")
        yield line + "\n", record


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(f"metric {name!r} must be a scalar, got shape {array.shape}: take its mean, sum or maximum.")
    if array.dtype.kind in "biu":
        return array.item()
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"metric {name!r} must be a real number, got {value!r}.")
    return float(str(array[()]))


def _encode(number: int | float) -> int | float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _decode(value: Any) -> int | float:
    return float(value) if isinstance(value, str) else value


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config), default=_name))


def _name(value: Any) -> str:
    """Names a function or class by its name, since its text holds an address, and anything else by its text."""
    return getattr(value, "__qualname__", str(value))


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
