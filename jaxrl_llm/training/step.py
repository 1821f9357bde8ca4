"""One training step: gradient of a loss, summed over micro-batches and devices, then an optax update.

The step is pure and uncompiled. The caller jits it (and donates the state), pmaps, shard_maps, vmaps or scans it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxrl_llm.models.lora import Adapted
from jaxrl_llm.reductions import combine_metrics, combine_metrics_over_axis, mark_varying, sum_over_axis
from jaxrl_llm.types import Key, Metrics, Params, Scalar

Batch: TypeAlias = Any
LossFunction: TypeAlias = Callable[[Params, Batch, Key], tuple[Scalar, Metrics]]
"""`loss_fn(params, batch, key) -> (loss, metrics)`: joins a model and losses; a recipe writes it."""
WeightsFunction: TypeAlias = Callable[[Batch, str | None], Any]
"""`weights_fn(batch, axis_name) -> weights`: see `reductions.loss_weights`."""
ExtraArgsFunction: TypeAlias = Callable[[Params, Batch, Key], dict[str, Any]]
"""`extra_args_fn(params, batch, key) -> {name: value}`: what `optimizer.update` needs besides the gradient."""


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
        params: Parameters, a pytree of arrays.
        opt_state: State of the optimizer.
        step: Number of updates made, an int32 scalar.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def init_train_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step.

    Raises:
        TypeError: If the parameters hold a frozen base beside its adapters.
    """
    if isinstance(params, Adapted):
        raise TypeError("Adapted params would train the base too: pass the first of split_trainable(params).")
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    weights_fn: WeightsFunction | None = None,
    num_microbatches: int = 1,
    axis_name: str | None = None,
    skip_nonfinite: bool = False,
    extra_args_fn: ExtraArgsFunction | None = None,
    optimizer_metrics_fn: Callable[[optax.OptState], Metrics] | None = None,
) -> Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]]:
    """Makes `step(state, batch, key) -> (state, metrics)`.

    Splitting never changes the answer: k micro-batches on n devices give the gradient of the whole batch, because
    the weights of the loss are made from the whole batch and everything after them is a sum.

    Args:
        loss_fn: `loss_fn(params, batch, key) -> (loss, metrics)`, the loss as a sum of weight × value. Inside a mapped
            axis it returns this device's share (pass it `axis_name` if it makes weights itself).
        optimizer: Any optax transformation; clipping belongs there and sees the summed gradient.
        weights_fn: `weights_fn(batch, axis_name)`, called on the whole batch before it is split. What it returns is put
            into the batch as `batch["weights"]` of a dict or the field `weights` of a NamedTuple.
        num_microbatches: In how many parts each device works through its batch, one after the other. Micro-batch i
            gets rows i, i + k, i + 2k … so that a batch sharded over devices stays where it is.
        axis_name: Mapped axis of `jax.pmap` or `jax.shard_map` over which to sum. Under jit with shardings: None.
        skip_nonfinite: Leave parameters and optimizer state as they are if the gradient is not finite.
        extra_args_fn: `extra_args_fn(params, batch, key)` makes keyword arguments for `optimizer.update`, such as the
            functions that `natural_gradient` needs. It gets the parameters before the step and the whole batch (of this
            device, with its weights): micro-batches do not split what these functions do. An optimizer that sums over
            devices must be given `axis_name` here.
        optimizer_metrics_fn: Reads metrics from the optimizer's new state, such as
            `optimizers.natural_gradient_metrics`.

    Returns:
        The step. It folds `state.step` into the key, then the micro-batch, then the device, so one key serves a whole
        run and a resumed run repeats exactly. Metrics are those of the loss with `loss`, `grad_norm` (before clipping)
        and `grad_nonfinite` (1 if the gradient held a NaN or infinity), and those of the optimizer.

    Raises:
        ValueError: If micro-batches come without `weights_fn`, or do not divide the batch (raised by the step).
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be at least 1, got {num_microbatches}.")
    if num_microbatches > 1 and weights_fn is None:
        raise ValueError(
            f"num_microbatches={num_microbatches} needs weights_fn. Without weights from the whole batch each "
            "micro-batch would be averaged on its own, which is another loss where lengths differ. See "
            "reductions.loss_weights."
        )
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if weights_fn is not None:
            batch = _with_weights(batch, weights_fn(batch, axis_name))
        params = mark_varying(state.params, axis_name)
        loss, metrics, grads = _accumulate(grad_fn, params, batch, key, num_microbatches, axis_name)
        loss, grads = sum_over_axis((loss, grads), axis_name)
        metrics = combine_metrics_over_axis(metrics, axis_name)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm)
        extra_args = {}
        if extra_args_fn is not None:
            extra_args = extra_args_fn(state.params, batch, _part_key(key, num_microbatches, axis_name))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra_args)
        if optimizer_metrics_fn is not None:
            metrics |= optimizer_metrics_fn(opt_state)
        params = optax.apply_updates(state.params, updates)
        if skip_nonfinite:
            kept = params, opt_state, state.params, state.opt_state
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), kept[:2], kept[2:])
        metrics |= {"loss": loss, "grad_norm": grad_norm, "grad_nonfinite": 1.0 - finite}
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def _accumulate(
    grad_fn: Callable, params: Params, batch: Batch, key: Key, num_microbatches: int, axis_name: str | None
) -> tuple[Scalar, Metrics, Params]:
    """Sums loss, metrics and gradient over the micro-batches of this device."""

    def one(microbatch: Batch, index: Array | int) -> tuple[Scalar, Metrics, Params]:
        (loss, metrics), grads = grad_fn(params, microbatch, _part_key(key, index, axis_name))
        return loss, metrics, grads

    if num_microbatches == 1:
        return one(batch, 0)

    def body(total: Params, step: tuple[Batch, Array]) -> tuple[Params, tuple[Scalar, Metrics]]:
        loss, metrics, grads = one(*step)
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    zeros = mark_varying(jax.tree.map(jnp.zeros_like, params), axis_name)
    parts = _split(batch, num_microbatches), jnp.arange(num_microbatches)
    grads, (losses, metrics) = jax.lax.scan(body, zeros, parts)
    return losses.sum(), combine_metrics(metrics), grads


def _part_key(key: Key, index: Array | int, axis_name: str | None) -> Key:
    """Derives the key of a micro-batch (the index after the last: of the extra arguments) on this device."""
    key = jax.random.fold_in(key, index)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _split(batch: Batch, num_microbatches: int) -> Batch:
    """Puts micro-batches in front: [rows, …] becomes [micro-batches, rows / micro-batches, …], strided."""

    def split(x: Array) -> Array:
        if x.shape[0] % num_microbatches:
            raise ValueError(
                f"num_microbatches={num_microbatches} must divide the rows of the batch (of each device), got "
                f"{x.shape[0]}."
            )
        return jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _with_weights(batch: Batch, weights: Any) -> Batch:
    if isinstance(batch, dict):
        return {**batch, "weights": weights}
    if "weights" in getattr(batch, "_fields", ()):
        return batch._replace(weights=weights)
    raise TypeError(
        f"weights_fn needs a batch to put the weights into: a dict, or a NamedTuple with a field `weights`, got "
        f"{type(batch).__name__}."
    )
