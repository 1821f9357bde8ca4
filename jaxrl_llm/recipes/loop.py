"""The loop around every training step: progress, metrics, evaluation, checkpoints, Ctrl-C and resume."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from rich.text import Text

from jaxrl_llm.recipes.options import RunOptions
from jaxrl_llm.recipes.progress import Progress, first_console
from jaxrl_llm.training import checkpoints
from jaxrl_llm.training.logging import RunLogger, SilentLogger, interruptible, read_metrics, require_free
from jaxrl_llm.training.parallel import sum_over_processes, wait_for_processes
from jaxrl_llm.types import Metrics

State = TypeVar("State")


class EarlyStopping(NamedTuple):
    """When a run has learned enough.

    Attributes:
        metric: Metric of the evaluation, the lower the better.
        patience: Evaluations without a new best value after which the run ends.
        keep: `keep(state)`, called with every new best.
    """

    metric: str
    patience: int
    keep: Callable[[Any], None]


def training_loop(
    config: RunOptions,
    state: State,
    update: Callable[[State, int], tuple[State, Metrics]],
    *,
    total_steps: int,
    label: str,
    evaluate: Callable[[State], dict[str, Any]] | None = None,
    sample: Callable[[State, int], list[dict[str, Any]]] | None = None,
    about: dict[str, Any] | None = None,
    early_stopping: EarlyStopping | None = None,
    show: Sequence[str] = ("loss",),
) -> tuple[State, bool]:
    """Runs `update(state, index) -> (state, metrics)` for every index from where the run stands to `total_steps`.

    The state is all that changes: an update that depends on nothing but (state, index) makes a resumed run equal to an
    uninterrupted one, bit for bit.

    Args:
        config: Settings of the recipe, which are written to config.json; how it was started (`resume`, `overwrite`) is not.
        state: Before the first step; the newest checkpoint replaces it if `config.resume` is set.
        update: One step; may donate the state.
        total_steps: Where the run ends.
        label: What is running, for the progress line.
        evaluate: `evaluate(state) -> metrics`, called before the first step, every `eval_steps` and at the end.
        sample: `sample(state, step) -> rows`, called where `evaluate` is; the rows go into samples.jsonl.
        about: What config.json holds besides the settings; a resumed run must have the same.
        early_stopping: Ends the run when evaluations no longer improve. It goes by the metrics that are written, so a
            resumed run ends where an uninterrupted one does.
        show: Metrics of the progress line.

    Raises:
        FileExistsError: If the folder holds a run, and nothing says to go on or to overwrite it.
        ValueError: If a run is resumed that was about something else, or its checkpoint does not fit the state.

    Returns:
        The last state, and whether the run is complete (it is not after Ctrl-C).
    """
    folder = Path(config.output_dir)
    start = checkpoints.latest_step(folder / "checkpoints") if config.resume else None
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("resume", "overwrite")} | (about or {})
    if start is not None:
        restored = checkpoints.restore(folder / "checkpoints", state, config=settings)
        _require_same(about or {}, restored.extra["config"])
        for leaf in jax.tree.leaves(state):  # a run never holds two states
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()
        state = restored.state
    elif not (config.overwrite or config.resume):
        require_free(folder)  # in all processes, so that none waits for another that was refused
    wait_for_processes("start of training")
    done = saved = start or 0
    with (
        _logger(config, settings, start) as logger,
        interruptible() as interrupt,
        Progress(max(total_steps, 1), label, start=done, show=show, console=first_console()) as progress,
    ):
        for difference in logger.config_differences:
            first_console().print(Text(f"Resumed with another option: {difference}", "yellow"), soft_wrap=True)

        def evaluation() -> dict[str, Any]:
            if sample is not None:
                logger.log_samples(done, sample(state, done))
            return {} if evaluate is None else evaluate(state)

        if evaluate is not None and done == 0:
            logger.log(0, evaluation())
        stop = _enough(early_stopping, state, folder, keep=start is None)
        while done < total_steps and not stop and not sum_over_processes(int(interrupt.stop)):
            state, metrics = update(state, done)
            done += 1
            last = done == total_steps
            evaluated = evaluate is not None and (last or done % config.eval_steps == 0)
            if evaluated:
                metrics = metrics | evaluation()
            if evaluated or last or done % config.logging_steps == 0:
                logger.log(done, metrics)
                progress.update(done, metrics)
            if evaluated:
                stop = _enough(early_stopping, state, folder)
            if last or done % config.save_steps == 0:
                _save(folder, done, state, settings, config.save_total_limit)
                saved = done
        if saved < done:  # stopped early or by Ctrl-C, which may come at any point of the loop
            _save(folder, done, state, settings, config.save_total_limit)
    wait_for_processes("end of training")  # so that all read the same metrics
    if stop and early_stopping is not None:
        patience = early_stopping.patience
        first_console().print(f"Ended at step {done} of {total_steps}: no better evaluation for {patience} times.")
    elif done < total_steps:
        first_console().print(f"Stopped after step {done} of {total_steps}; --resume goes on from here.")
    return state, stop or done >= total_steps


def _require_same(about: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses to go on with a run in which a step means something else."""
    for name, value in about.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"resume must go on with {name}={saved[name]!r} of the saved run, got {value!r}. (The rows of a step are "
                "per_device_train_batch_size times the data and fsdp axes of the mesh.)"
            )


def _logger(config: RunOptions, settings: dict[str, Any], start: int | None) -> RunLogger | SilentLogger:
    if jax.process_index() > 0:
        return SilentLogger()
    overwrite = config.overwrite or config.resume
    return RunLogger(config.output_dir, config=settings, resume_step=start, overwrite=overwrite)


def _enough(early_stopping: EarlyStopping | None, state: Any, folder: Path, *, keep: bool = True) -> bool:
    """Reads the evaluations so far; keeps the state if it is the best yet, and tells whether patience is over."""
    if early_stopping is None:
        return False
    name = early_stopping.metric
    values = [line[name] for line in read_metrics(folder) if name in line]
    finite = [value for value in values if math.isfinite(value)]
    since_best = len(values) - 1 - values.index(min(finite)) if finite else max(len(values) - 1, 0)
    if since_best == 0 and keep:
        early_stopping.keep(state)
    return since_best >= early_stopping.patience


def _save(folder: Path, step: int, state: Any, settings: dict[str, Any], keep: int) -> None:
    checkpoints.save(folder / "checkpoints", step, state, extra={"config": settings}, keep=keep)
