import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from jaxrl_llm.reductions import (
    LossWeights,
    as_loss_weights,
    combine_metrics,
    combine_metrics_over_axis,
    loss_weights,
    masked_mean,
    masked_standardize,
    masked_std,
    row_weights,
    token_weights,
    weighted_sum,
)
from tests.golden import fixture
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)

VALUES, MASK = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), jnp.array([[1, 1, 0], [1, 1, 1]])


# The table of Tunix (tests/rl/common_test.py, aggregate_loss).
@pytest.mark.parametrize(
    ("reduction", "options", "expected"),
    [
        ("token_mean", {}, 0.36),
        ("sequence_mean", {}, 0.325),
        ("constant", {"max_length": 3}, 0.3),
        ("constant", {"max_length": 3.14}, 0.2866242),
        ("sequence_sum", {}, 0.9),
    ],
)
def test_weighted_sums_equal_tunix(reduction, options, expected):
    close(weighted_sum(VALUES, token_weights(MASK, reduction, **options)), expected)


@pytest.mark.parametrize(
    ("reduction", "first_row"),
    [
        ("token_mean", [0.5, 0.5]),
        ("sequence_mean", [1 / 4, 1 / 4]),
        ("sequence_sum", [0.5, 0.5]),
        ("constant", [0.1, 0.1]),
    ],
)
def test_an_empty_row_is_a_row(reduction, first_row):
    weights = token_weights(jnp.array([[1, 1], [0, 0]]), reduction, max_length=5)
    close(weights, [first_row, [0, 0]])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32])
def test_an_empty_batch_has_weights_of_zero(reduction, dtype):
    weights = token_weights(jnp.zeros((2, 3), dtype), reduction, max_length=5)
    assert weights.dtype == jnp.float32
    assert not weights.any()


def test_any_mask_that_is_not_zero_counts_once():
    close(token_weights(jnp.array([[2.0, 0.5, 0.0]]), "token_mean"), [[0.5, 0.5, 0]])


def test_weights_of_a_loss_have_a_mean_over_tokens_beside_the_reduction():
    weights = loss_weights(MASK, "sequence_mean", value_mask=jnp.array([[1, 1, 1], [1, 0, 0]]))
    close(weights.policy, token_weights(MASK, "sequence_mean"))
    close(weights.tokens, MASK / 5)
    close(weights.value, np.array([[1, 1, 1], [1, 0, 0]]) / 4)
    close(loss_weights(MASK, "sequence_mean").value, MASK / 5)


def test_one_array_serves_as_the_weights_of_all_terms():
    assert as_loss_weights(VALUES) == LossWeights(VALUES, VALUES, VALUES)
    assert as_loss_weights(LossWeights(1, 2, 3)) == (1, 2, 3, None)


def test_rows_weigh_the_same():
    close(row_weights(jnp.zeros(4)), np.full(4, 1 / 4))


def test_a_weighted_sum_reads_no_value_of_weight_zero():
    weights = jnp.array([0.5, 0.0, 2.0])
    value, grad = jax.value_and_grad(weighted_sum)(jnp.array([1.0, jnp.nan, 3.0]), weights)
    assert value == 6.5
    close(grad, weights)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [("constant", "needs max_length"), ("mean", r"reduction must be one of .*'token_mean'.*'mean'")],
)
def test_errors_name_the_argument_and_the_cure(reduction, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        token_weights(MASK, reduction)


# Statistics


def test_the_dishes_of_the_guide_have_a_mean_of_7_4():
    close(masked_mean(jnp.array([8.0, 7, 9, 6, 7]), jnp.ones(5)), 7.4)


@pytest.mark.parametrize(
    ("values", "mask", "mean", "variance"),
    [
        ([1, 2, 3, 4, 5], [1, 1, 0, 0, 1], 2.666667, 4.333333),
        ([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], 6.0, 10.285715),
        ([1, 2, 3, 4], [0, 1, 1, 0], 2.5, 0.5),
        ([3, 5], [1, 1], 4.0, 2.0),
    ],
)
def test_statistics_equal_tunix_and_trl(values, mask, mean, variance):
    values, mask = jnp.array(values, jnp.float32), jnp.array(mask)
    close(masked_mean(values, mask), mean)
    close(masked_std(values, mask) ** 2, variance)


def test_whitening_equals_trl():
    golden = fixture.GOLDEN["ppo masked_* x=[[1,2,3,4],[.5,-1,2,8]] mask=[[1,1,1,0],[1,1,0,0]]"]
    values = jnp.array([[1.0, 2, 3, 4], [0.5, -1, 2, 8]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    exact = functools.partial(np.testing.assert_allclose, rtol=fixture.RTOL)
    exact(masked_mean(values, jnp.asarray(mask)), golden["mean"])
    exact(masked_std(values, jnp.asarray(mask)) ** 2, golden["var"])
    for row, shift_mean in (("whiten", True), ("whiten_noshift", False)):
        # TRL leaves numbers where the mask is zero; ours are zero there.
        expected = np.where(mask, golden[row], 0)
        exact(masked_standardize(values, jnp.asarray(mask), shift_mean=shift_mean), expected)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 / 7])
def test_equal_values_are_standardized_to_exactly_zero(value):
    values, mask = jnp.full((7, 9), value), jnp.tri(7, 9, dtype=bool)
    assert not np.any(jax.jit(masked_standardize)(values, mask))
    unshifted = jax.jit(functools.partial(masked_standardize, shift_mean=False))(values, mask)
    np.testing.assert_array_equal(unshifted, np.where(mask, values, 0))


SHAPE = (4, 6)
arrays = hnp.arrays(np.float32, SHAPE, elements=st.floats(-100, 100, width=32))
masks = hnp.arrays(bool, SHAPE)


@jax.jit
def statistics(values, mask):
    return masked_mean(values, mask), masked_std(values, mask), masked_standardize(values, mask)


@given(arrays, masks, st.sampled_from([np.nan, np.inf]))
def test_statistics_equal_those_of_what_counts(values, mask, garbage):
    mean, std, standardized = jax.device_get(statistics(np.where(mask, values, garbage), mask))
    counted = values[mask].astype(np.float64)
    close(mean, counted.mean() if counted.size else 0, atol=1e-4)
    close(std, counted.std(ddof=1) if counted.size > 1 else 0, rtol=1e-5, atol=1e-4)
    assert not standardized[~mask].any()
    if counted.size > 1 and std > 1e-2:
        close(standardized[mask], (counted - counted.mean()) / counted.std(ddof=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
def test_statistics_have_a_finite_gradient_where_nothing_varies_and_garbage_is_masked(mask):
    values = jnp.array([2.0, 2.0, 2.0, jnp.nan])

    @jax.jit
    @jax.grad
    def gradient(values):
        mean, std, standardized = statistics(values, jnp.array(mask))
        return mean + std + (standardized * jnp.arange(4)).sum()

    assert np.isfinite(gradient(values)).all()


def test_statistics_over_devices_are_those_of_the_whole():
    values, mask = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32), np.tri(8, 5, -1, bool)

    def everything(values, mask, axis_name=None):
        weights = {
            name: token_weights(mask, name, max_length=7, axis_name=axis_name)
            for name in ("token_mean", "sequence_mean", "sequence_sum", "constant")
        }
        weights["row"] = row_weights(values[:, 0], axis_name=axis_name)
        weights["loss"] = loss_weights(mask, "token_mean", value_mask=~mask, axis_name=axis_name)
        options = {"mask": mask, "axis_name": axis_name}
        return (weights, masked_standardize(values, **options)), (
            masked_mean(values, **options),
            masked_std(values, **options),
        )

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    mapped = functools.partial(everything, axis_name="data")
    sharded = jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    jax.tree.map(close, jax.jit(sharded)(values, mask), jax.jit(everything)(values, mask))


METRICS = {
    "loss": [1.0, 2.0],
    "completions/min_length": [3.0, 4.0],
    "clip_ratio/high_max": [0.5, 0.25],
    "min_reward": [-1.0, 1.0],
    "max_entropy/mean": [1.0, 1.0],
    "minimum": [1.0, 1.0],
}
COMBINED = [3.0, 3.0, 0.5, -1.0, 2.0, 2.0]


def test_metrics_combine_as_the_last_part_of_their_name_says():
    combined = combine_metrics({name: jnp.array(parts) for name, parts in METRICS.items()})
    assert [float(combined[name]) for name in METRICS] == COMBINED


def test_metrics_combine_over_an_axis_as_they_do_over_parts():
    metrics = {name: jnp.array(parts) for name, parts in METRICS.items()}
    combined = jax.vmap(lambda part: combine_metrics_over_axis(part, "parts"), axis_name="parts")(metrics)
    assert [float(combined[name][0]) for name in METRICS] == COMBINED
    alone = {"loss": jnp.array(1.0)}
    assert combine_metrics_over_axis(alone, None) == alone
