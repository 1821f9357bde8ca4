"""What every loss promises, tested over the list of all losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxrl_llm.reductions import combine_metrics, combine_metrics_over_axis, sum_over_axis
from tests.losses.cases import (
    CASES,
    PER_ROW,
    ROWS,
    TIME,
    Batch,
    Result,
    evaluate,
    make_batch,
    random_mask,
    whole_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES = 4
EVALUATE, WEIGHTS, JOIN = jax.jit(evaluate), jax.jit(whole_weights), jax.jit(combine_metrics)

masks = hnp.arrays(bool, (ROWS, TIME))
seeds = st.integers(0, 2**16)
garbage = st.sampled_from([np.nan, np.inf, -np.inf, 1e30])
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)

MEANS_OVER_WHAT_COUNTS = (
    *(
        "cross_entropy",
        "cross_entropy_regularized",
        "policy_gradient",
        "ppo",
        "value",
        "bnpo",
        "dapo",
        "cispo",
        "vespo",
    ),
    "top_entropy",
    *(
        "cross_entropy_dft",
        "distillation",
        "dpo",
        "dpo_every_type",
        "dpo_weighted",
        "kto",
        "bco",
        "orpo",
        "cpo",
        "simpo",
    ),
    "reward_model",
    "reward_regression",
)
"""For the other losses an empty row counts as a row, with a loss of 0."""


HELD = "cross_entropy_dft", "cispo", "vespo", "gspo_token"
"""Losses that hold a function of the policy constant, so that their gradient is not that of their value."""


def results_of(batch: Batch) -> dict[str, Result]:
    return jax.device_get(EVALUATE(batch, WEIGHTS(batch)))


def _like(mask: np.ndarray, x: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def spoil(batch: Batch, value: float) -> Batch:
    """Writes `value` wherever the masks say that nothing is read."""
    tokens = [name for name, x in batch.items() if x.ndim >= 2 and name != "mask"]
    spoiled = {name: np.where(_like(batch["mask"], batch[name]), batch[name], value) for name in tokens}
    return batch | spoiled | {name: np.where(batch["row_mask"], batch[name], value) for name in PER_ROW}


@settings(max_examples=10)
@given(masks, seeds, garbage)
def test_padding_never_changes_a_loss(mask, seed, value):
    batch = make_batch(seed, mask)
    pad = ((0, 0), (0, 3), (0, 0))
    longer = {name: np.pad(x, pad[: x.ndim]) if x.ndim >= 2 else x for name, x in batch.items()}
    results = results_of(spoil(longer, value))
    close(jax.tree.map(lambda x: x[:, :TIME] if x.ndim >= 2 else x, results), results_of(batch))
    assert not any(grad[:, TIME:].any() for r in results.values() for grad in r.grads.values() if grad.ndim >= 2)


@given(masks, seeds)
def test_empty_rows_never_change_a_mean_over_what_counts(mask, seed):
    mask[2:] = False
    batch = make_batch(seed, mask)
    short, long = results_of(jax.tree.map(lambda x: x[:2], batch)), results_of(batch)
    for name in MEANS_OVER_WHAT_COUNTS:
        close(long[name].loss, short[name].loss)
        close(jax.tree.map(lambda x: x[:2], long[name].grads), short[name].grads)


@given(masks, seeds, st.permutations(range(ROWS)))
def test_the_order_of_rows_never_changes_a_loss(mask, seed, order):
    batch = make_batch(seed, mask)
    results = results_of(jax.tree.map(lambda x: x[order], batch))
    for name, expected in results_of(batch).items():
        close(results[name].loss, expected.loss)
        close(results[name].metrics, expected.metrics)
        close(results[name].grads, jax.tree.map(lambda x: x[order], expected.grads))


@given(masks, seeds)
def test_the_parts_of_a_split_batch_add_up(mask, seed):
    batch = make_batch(seed, mask)
    whole = batch, jax.device_get(WEIGHTS(batch))
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], whole) for i in range(0, ROWS, 2)]
    results = jax.device_get([EVALUATE(*part) for part in parts])
    for name, expected in results_of(batch).items():
        part = [r[name] for r in results]
        close(sum(r.loss for r in part), expected.loss)
        close(JOIN(jax.tree.map(lambda *x: np.stack(x), *[r.metrics for r in part])), expected.metrics)
        close(jax.tree.map(lambda *x: np.concatenate(x), *[r.grads for r in part]), expected.grads)


@settings(max_examples=10)
@given(masks, seeds, garbage)
def test_garbage_in_masked_inputs_does_no_harm(mask, seed, value):
    batch = make_batch(seed, mask)
    close(results_of(spoil(batch, value)), results_of(batch))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_empty_row_has_no_gradient(value):
    batch = make_batch(0, random_mask(0))
    empty = ~batch["row_mask"]
    assert empty.any()
    for name, result in results_of(spoil(batch, value)).items():
        assert np.isfinite(result.loss), name
        for grad in jax.tree.leaves(result.grads):
            assert not grad[empty].any(), name
            assert grad[~empty].any(), name


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_empty_batch_has_a_loss_of_zero_and_no_gradient(value):
    batch = spoil(make_batch(0, np.zeros((ROWS, TIME), bool)), value)
    for name, result in results_of(batch).items():
        assert result.loss == 0, name
        assert not any(grad.any() for grad in jax.tree.leaves(result.grads)), name


@pytest.mark.parametrize("gap", [-200.0, 200.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_distant_policies_give_finite_losses_and_gradients(gap, sign):
    batch = make_batch(0, random_mask(0))
    far = {
        "old_log_probs": batch["log_probs"] - gap,
        "ref_log_probs": batch["log_probs"] - gap,
        "advantages": sign * np.abs(batch["advantages"]),
        "policy_chosen": batch["ref_chosen"] + gap,
        "policy_rejected": batch["ref_rejected"] - gap,
        "chosen": batch["rejected"] + gap,
    }
    chex.assert_tree_all_finite(results_of(batch | far))


@pytest.mark.parametrize("name", [name for name in CASES if name not in HELD])
def test_gradients_equal_finite_differences(name):
    with jax.enable_x64(True):
        batch, case = make_batch(3, random_mask(3)), CASES[name]
        trained = {field: jnp.asarray(batch[field]) for field in case.trained}
        loss = jax.jit(lambda trained: case.loss(jax.tree.map(jnp.asarray, batch) | trained, None, None)[0])
        assert loss(trained).dtype == jnp.float64
        check_grads(loss, (trained,), order=1, modes="rev", atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_trained_is_a_constant_and_metrics_have_no_gradient(name):
    batch, case = make_batch(0, random_mask(0)), CASES[name]
    floats = {field: x for field, x in batch.items() if x.dtype == float and field != "margin"}

    @jax.jit
    def gradients(floats, masks):
        loss, pullback, _ = jax.vjp(lambda x: case.loss(masks | x, None, None), floats, has_aux=True)
        (of_loss,) = pullback(jnp.ones_like(loss))
        _, of_metrics = jax.jvp(lambda x: case.loss(masks | x, None, None)[1], (floats,), (floats,))
        return of_loss, of_metrics

    of_loss, of_metrics = gradients(floats, {field: x for field, x in batch.items() if field not in floats})
    assert {field for field, x in of_loss.items() if x.any()} == set(case.trained)
    assert not any(np.any(x) for x in of_metrics.values() if x.dtype != jax.dtypes.float0)


def test_weights_made_by_the_loss_are_those_of_its_weights_function():
    batch = make_batch(0, random_mask(0)) | {"row_mask": np.ones(ROWS, bool)}
    own = jax.jit(lambda batch: {name: case.loss(batch, None, None) for name, case in CASES.items()})(batch)
    close(own, {name: (r.loss, r.metrics) for name, r in results_of(batch).items()})


@pytest.mark.slow
def test_compiled_equals_eager():
    batch = jax.tree.map(jnp.asarray, make_batch(1, random_mask(1)))
    close(evaluate(batch, whole_weights(batch)), results_of(batch))


# Sharding. A mapped loss returns its device's share, so sums over the axis are left to the caller.


def share(batch: Batch) -> tuple:
    results = evaluate(batch, whole_weights(batch, "data"), "data")
    losses = sum_over_axis({name: r.loss for name, r in results.items()}, "data")
    metrics = {name: combine_metrics_over_axis(r.metrics, "data") for name, r in results.items()}
    return losses, metrics, {name: r.grads for name, r in results.items()}


def by_pmap(batch: Batch) -> tuple:
    pieces = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    losses, metrics, grads = jax.pmap(share, axis_name="data", devices=jax.devices()[:DEVICES])(pieces)
    losses, metrics = jax.tree.map(lambda x: x[0], (losses, metrics))
    return losses, metrics, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), grads)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def by_shard_map(batch: Batch, check_vma: bool) -> tuple:
    specs = P("data"), (P(), P(), P("data"))
    return jax.jit(jax.shard_map(share, mesh=mesh(), in_specs=specs[0], out_specs=specs[1], check_vma=check_vma))(batch)


def by_sharded_arguments(batch: Batch) -> tuple:
    results = results_of(jax.device_put(batch, NamedSharding(mesh(), P("data"))))
    losses = {name: r.loss for name, r in results.items()}
    return losses, {name: r.metrics for name, r in results.items()}, {name: r.grads for name, r in results.items()}


SHARDED = {
    "pmap": by_pmap,
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map_unchecked": functools.partial(by_shard_map, check_vma=False),
    "jit": by_sharded_arguments,
}


@pytest.mark.parametrize("form", SHARDED)
def test_the_sharded_loss_is_the_global_loss(form):
    batch = make_batch(2, random_mask(2))
    losses, metrics, grads = jax.device_get(SHARDED[form](batch))
    for name, expected in results_of(batch).items():
        close((losses[name], metrics[name], grads[name]), tuple(expected))
