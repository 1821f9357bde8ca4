import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.reductions import token_weights
from jaxrl_llm.training import TrainState, init_train_state, make_train_step
from tests.losses.cases import CASES, make_batch, random_mask, whole_weights

DEVICES, FEATURES = 4, 3

# Every loss at once. Each has parameters of its own, so that none can hide behind another: a linear model adds to each
# input that the loss trains.


def model(params, batch):
    def predict(field, kernel):
        scores = batch["features"] @ kernel
        if batch[field].ndim == 3:  # logits: of the first token
            return batch[field] + scores[..., None] * jnp.eye(1, batch[field].shape[-1])[None]
        return batch[field] + (scores if batch[field].ndim == 2 else scores[:, 0])

    return {field: predict(field, kernel) for field, kernel in params.items()}


def every_loss(params, batch, key):
    total, metrics = 0.0, {}
    for name, case in CASES.items():
        loss, of_case = case.loss(batch | model(params[name], batch), batch["weights"][name], None)
        total += loss
        metrics |= {f"{name}/{metric}": value for metric, value in of_case.items()} | {f"{name}/loss": loss}
    return total, metrics


def setting():
    rng = np.random.default_rng(0)
    params = {
        name: {field: jnp.asarray(rng.normal(scale=0.1, size=FEATURES), jnp.float32) for field in case.trained}
        for name, case in CASES.items()
    }
    mask = random_mask(5)
    batch = make_batch(5, mask) | {"features": rng.normal(size=(*mask.shape, FEATURES))}
    return params, jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float32), batch)


MAX_GRAD_NORM = 0.5
OPTIMIZER = make_optimizer("momentum", learning_rate=0.1, max_grad_norm=MAX_GRAD_NORM)
make_step = functools.partial(make_train_step, every_loss, OPTIMIZER, weights_fn=whole_weights)


def on_one_device(step, state, batch, key):
    return jax.jit(step)(state, batch, key)


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def by_pmap(step, state, batch, key):
    pieces = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0, None), devices=jax.devices()[:DEVICES])
    results = jax.device_get(mapped(state, pieces, key))
    chex.assert_trees_all_equal(*[jax.tree.map(lambda x, i=i: x[i], results) for i in range(DEVICES)])
    return jax.tree.map(lambda x: x[0], results)


def by_shard_map(step, state, batch, key, check_vma=True):
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh(), check_vma=check_vma, **specs))(state, batch, key)


def by_sharded_arguments(step, state, batch, key):
    whole, rows = NamedSharding(mesh(), P()), NamedSharding(mesh(), P("data"))
    return jax.jit(step)(jax.device_put(state, whole), jax.device_put(batch, rows), jax.device_put(key, whole))


MAPPED = {"axis_name": "data"}
FORMS = {
    "micro-batches": (on_one_device, {"num_microbatches": 4}),
    "pmap": (by_pmap, MAPPED),
    "shard_map of micro-batches": (by_shard_map, MAPPED | {"num_microbatches": 2}),
    "sharded arguments": (by_sharded_arguments, {}),
}
OTHER_FORMS = {
    "pmap of micro-batches": (by_pmap, MAPPED | {"num_microbatches": 2}),
    "shard_map": (by_shard_map, MAPPED),
    "unchecked shard_map": (functools.partial(by_shard_map, check_vma=False), MAPPED),
    "unchecked shard_map of micro-batches": (
        functools.partial(by_shard_map, check_vma=False),
        MAPPED | {"num_microbatches": 2},
    ),
    "sharded arguments in micro-batches": (by_sharded_arguments, {"num_microbatches": 2}),
}


@functools.cache
def the_whole_batch_at_once():
    params, batch = setting()
    return jax.device_get(on_one_device(make_step(), init_train_state(params, OPTIMIZER), batch, jax.random.key(0)))


@pytest.mark.parametrize("form", [*FORMS, *(pytest.param(form, marks=pytest.mark.slow) for form in OTHER_FORMS)])
def test_splitting_never_changes_the_step(form):
    params, batch = setting()
    run, options = (FORMS | OTHER_FORMS)[form]
    state, metrics = jax.device_get(
        run(make_step(**options), init_train_state(params, OPTIMIZER), batch, jax.random.key(0))
    )
    expected_state, expected_metrics = the_whole_batch_at_once()
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-6, atol=1e-6)


def test_every_loss_moves_its_parameters():
    params, _ = setting()
    state, metrics = the_whole_batch_at_once()
    assert state.step == 1
    assert metrics["grad_norm"] > MAX_GRAD_NORM
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max() > 1e-5, state.params, params)
    assert all(jax.tree.leaves(moved)), moved


# One small loss for the rest: the mean over what counts of (x · w - y)².


def weigh(batch, axis_name):
    return token_weights(batch["mask"], "token_mean", axis_name=axis_name)


def squared(params, batch, key):
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return jnp.sum(batch["weights"] * error), {"noise": jax.random.uniform(key)}


PARAMS = {"w": jnp.array([1.0, -2.0])}
BATCH = {
    "x": jnp.arange(16.0).reshape(4, 2, 2) / 10,
    "y": jnp.ones((4, 2)),
    "mask": jnp.array([[1, 1], [1, 0], [0, 0], [1, 1]]),
}
KEY = jax.random.key(0)


def small(optimizer=None, loss_fn=squared, weights_fn=weigh, **options):
    optimizer = make_optimizer("adam", learning_rate=0.1) if optimizer is None else optimizer
    return make_train_step(loss_fn, optimizer, weights_fn=weights_fn, **options), init_train_state(PARAMS, optimizer)


def test_a_step_by_hand():
    step, state = small(make_optimizer("sgd", learning_rate=0.5))
    state, metrics = jax.jit(step)(state, BATCH, KEY)
    x, w, mask = np.asarray(BATCH["x"]), np.asarray(PARAMS["w"]), np.asarray(BATCH["mask"])
    error = (x @ w - 1) * mask
    gradient = 2 * np.einsum("bt,btf->f", error, x) / 5
    np.testing.assert_allclose(metrics["loss"], (error**2).sum() / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], w - 0.5 * gradient, rtol=1e-6)
    assert metrics["grad_nonfinite"] == 0
    assert state.step == 1


def test_the_norm_is_reported_before_clipping():
    free, clipped = (
        jax.jit(small(make_optimizer("sgd", learning_rate=0.1, max_grad_norm=limit))[0]) for limit in (None, 1e-3)
    )
    states = [small(make_optimizer("sgd", learning_rate=0.1, max_grad_norm=limit))[1] for limit in (None, 1e-3)]
    (_, expected), (state, metrics) = free(states[0], BATCH, KEY), clipped(states[1], BATCH, KEY)
    assert metrics["grad_norm"] == expected["grad_norm"] > 1
    np.testing.assert_allclose(jnp.linalg.norm(state.params["w"] - PARAMS["w"]), 1e-4, rtol=1e-3)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_step_compiles_once_and_gives_its_buffers_back(num_microbatches):
    chex.clear_trace_counter()
    step, state = small(num_microbatches=num_microbatches)
    compiled = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        previous, (state, _) = state, compiled(state, BATCH, KEY)
        assert all(x.is_deleted() for x in jax.tree.leaves(previous.params))
    assert state.step == 3


def test_steps_may_be_scanned_and_swept():
    def run(rate, key):
        step, state = small(make_optimizer("adam", learning_rate=rate))
        return jax.lax.scan(lambda state, _: step(state, BATCH, key), state, length=20)[1]["loss"]

    losses = jax.jit(jax.vmap(run))(jnp.array([0.1, 0.0]), jax.random.split(KEY))
    assert losses[0, -1] < 0.5 * losses[0, 0]
    np.testing.assert_array_equal(losses[1], losses[1, 0])


class FieldBatch(NamedTuple):
    x: Any
    y: Any
    mask: Any
    weights: Any = None


def test_a_named_tuple_takes_its_weights_in_a_field():
    def loss_fn(params, batch, key):
        return squared(params, batch._asdict(), key)

    def weights_fn(batch, axis_name):
        return weigh(batch._asdict(), axis_name)

    step, state = small(loss_fn=loss_fn, weights_fn=weights_fn, num_microbatches=2)
    as_fields = jax.jit(step)(state, FieldBatch(**BATCH), KEY)
    step, state = small(num_microbatches=2)
    chex.assert_trees_all_equal(as_fields, jax.jit(step)(state, BATCH, KEY))


def test_an_unsplit_batch_needs_no_weights_function():
    def loss_fn(params, batch, key):
        return cross_entropy_loss(batch["y"] * params["w"].sum(), batch["mask"])

    step, state = small(loss_fn=loss_fn, weights_fn=None)
    _, metrics = jax.jit(step)(state, BATCH, KEY)
    assert metrics["loss"] == metrics["nll"] == 1


# Randomness


def test_one_key_serves_a_whole_run():
    step, state = small()
    later, compiled = state._replace(step=state.step + 1), jax.jit(step)
    now, again, later, other = (
        float(compiled(state, BATCH, key)[1]["noise"])
        for state, key in [(state, KEY), (state, KEY), (later, KEY), (state, jax.random.key(1))]
    )
    assert now == again
    assert len({now, later, other}) == 3


def test_each_microbatch_and_each_device_has_its_own_key():
    def loss_fn(params, batch, key):
        loss, metrics = squared(params, batch, key)
        draw = metrics["noise"]
        return loss, {"min": draw, "max": draw, "sum": draw}

    step, state = small(loss_fn=loss_fn, num_microbatches=2, axis_name="data")
    pieces = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    _, metrics = jax.vmap(step, in_axes=(None, 0, None), axis_name="data")(state, pieces, KEY)
    low, high, total = (float(metrics[name][0]) for name in ("min", "max", "sum"))
    draws = [
        jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), part), device))
        for part in range(2)
        for device in range(2)
    ]
    assert len({float(x) for x in draws}) == 4
    np.testing.assert_allclose([low, high, total], [min(draws), max(draws), sum(draws)], rtol=1e-6)


# What is not finite


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_gradient_that_is_not_finite_is_reported_and_may_be_skipped(num_microbatches):
    reporting, state = small(num_microbatches=num_microbatches)
    skipping, _ = small(num_microbatches=num_microbatches, skip_nonfinite=True)
    reporting, skipping = jax.jit(reporting), jax.jit(skipping)
    state, _ = skipping(state, BATCH, KEY)
    for bad in (np.nan, np.inf):
        spoiled = BATCH | {"y": BATCH["y"].at[0, 0].set(bad)}
        broken, metrics = reporting(state, spoiled, KEY)
        assert metrics["grad_nonfinite"] == 1
        assert not np.isfinite(broken.params["w"]).all()
        kept, metrics = skipping(state, spoiled, KEY)
        assert metrics["grad_nonfinite"] == 1
        chex.assert_trees_all_equal(kept, TrainState(state.params, state.opt_state, state.step + 1))
        healthy, metrics = skipping(kept, BATCH, KEY)
        assert metrics["grad_nonfinite"] == 0
        assert (healthy.params["w"] != kept.params["w"]).all()


# Errors


def test_microbatches_without_weights_are_refused():
    with pytest.raises(ValueError, match=r"num_microbatches=2 needs weights_fn.*See reductions.loss_weights"):
        small(weights_fn=None, num_microbatches=2)


def test_no_microbatches_are_refused():
    with pytest.raises(ValueError, match="num_microbatches must be at least 1, got 0"):
        small(num_microbatches=0)


def test_microbatches_that_do_not_divide_the_rows_are_refused():
    step, state = small(num_microbatches=3)
    with pytest.raises(ValueError, match=r"num_microbatches=3 must divide the rows of the batch .* got 4"):
        step(state, BATCH, KEY)


@pytest.mark.parametrize("batch", [(jnp.ones(2),), [jnp.ones(2)]])
def test_a_batch_that_cannot_hold_weights_is_refused(batch):
    step, state = small(weights_fn=lambda batch, axis_name: jnp.ones(2))
    with pytest.raises(TypeError, match=rf"a dict, or a NamedTuple with a field `weights`, got {type(batch).__name__}"):
        step(state, batch, KEY)


def recording():
    """An optimizer that steps by the extra arguments it is given, and keeps them as its state."""

    def update(grads, state, params, *, start, rows, noise):
        return jax.tree.map(lambda g: -g * rows, grads), {"seen/start": start, "seen/rows": rows, "seen/noise": noise}

    zeros = {name: jnp.zeros(()) for name in ("seen/start", "seen/rows", "seen/noise")}
    return optax.GradientTransformationExtraArgs(lambda params: zeros, update)


def test_an_optimizer_gets_its_extra_arguments_from_the_whole_batch_and_its_metrics_are_logged():
    batch = {"x": jnp.ones((4, 2)), "y": jnp.arange(4.0), "mask": jnp.array([1, 0, 1, 1])}

    def extra_args(params, batch, key):
        counted = (batch["weights"] > 0).sum().astype(jnp.float32)
        return {"start": params["w"].sum(), "rows": counted, "noise": jax.random.uniform(key)}

    optimizer = recording()
    state = init_train_state({"w": jnp.array([1.0, 2.0])}, optimizer)
    results = {}
    for parts in (1, 2):
        step = make_train_step(
            squared,
            optimizer,
            weights_fn=weigh,
            num_microbatches=parts,
            extra_args_fn=extra_args,
            optimizer_metrics_fn=lambda opt_state: opt_state,
        )
        results[parts] = jax.jit(step)(state, batch, jax.random.key(0))
    (new, metrics), (by_parts, _) = results.values()
    assert metrics["seen/start"] == 3
    assert metrics["seen/rows"] == 3
    assert metrics["seen/noise"] != metrics["noise"], "the key is not that of the loss"
    # The gradient of the mean of (3 − y)² over y = 0, 2, 3 is 2 (3 + 1 + 0) / 3, times three rows.
    np.testing.assert_allclose(new.params["w"], [1 - 8, 2 - 8], rtol=1e-6)
    np.testing.assert_allclose(by_parts.params["w"], new.params["w"], rtol=1e-6)
