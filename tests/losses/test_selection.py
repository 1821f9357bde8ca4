"""Which tokens a policy learns from: portable cases of TRL's tests, and that selections enter the loss as they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.losses import (
    grpo_loss,
    grpo_weights,
    importance_correction,
    mask_truncated_completions,
    off_policy_mask,
    top_entropy_mask,
)
from tests.unchecked import unchecked

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)

# The cases of TRL's tests name the share that is dropped, we (as its option) the one that is kept.
ENTROPY = jnp.arange(1, 13).reshape(2, 6) / 10
RAGGED = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("quantile", "kept"), [(0.2, [0.9, 1.0]), (0.5, [0.6, 0.7, 0.8, 0.9, 1.0]), (0.0, [1.0]), (1.0, list(range(1, 11)))]
)
def test_the_tokens_of_highest_entropy_are_kept(quantile, kept):
    selected = top_entropy_mask(ENTROPY, RAGGED, quantile)
    close(np.sort(np.asarray(ENTROPY)[np.asarray(selected)]), np.array(kept) / (10 if quantile == 1 else 1))


def test_no_token_is_kept_where_all_are_masked():
    assert not top_entropy_mask(ENTROPY, jnp.zeros_like(RAGGED), 0.5).any()


@pytest.mark.parametrize("quantile", [0.1, 0.2, 0.7])
def test_equal_entropies_are_all_kept(quantile):
    # An interpolation as a weighted mean would round to a threshold above them.
    np.testing.assert_array_equal(top_entropy_mask(jnp.full((2, 6), 0.7), RAGGED, quantile), RAGGED != 0)


def test_garbage_under_the_mask_never_moves_the_threshold():
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        spoiled = jnp.where(RAGGED != 0, ENTROPY, value)
        np.testing.assert_array_equal(
            top_entropy_mask(spoiled, RAGGED, 0.3), top_entropy_mask(ENTROPY, RAGGED, 0.3), err_msg=str(value)
        )


def test_the_threshold_is_that_of_all_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    select = functools.partial(top_entropy_mask, quantile=0.2, axis_name="data")
    sharded = jax.shard_map(select, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(ENTROPY, RAGGED)
    np.testing.assert_array_equal(sharded, top_entropy_mask(ENTROPY, RAGGED, 0.2))


def test_rows_that_drifted_are_kept_only_where_they_were_good():
    log_probs = jnp.array([[-2.0, -2.0, 1e4], [-0.5, -0.5, -1e4], [-2.0, -2.0, 1e4]])
    mask, advantages = jnp.array([[1, 1, 0]] * 3), jnp.array([[1.0], [-1.0], [-1.0]]) * jnp.ones((3, 3))
    kept = off_policy_mask(log_probs, jnp.full((3, 3), -0.5), advantages, mask, 1.0)
    np.testing.assert_array_equal(kept[:, 0], [True, True, False])


def test_a_token_that_the_sampler_did_not_score_is_no_evidence_of_drift():
    sampling = jnp.array([[-1.0, jnp.nan]])
    ones = jnp.ones((1, 2))
    assert off_policy_mask(-ones, sampling, -ones, ones, 0.1).all()
    np.testing.assert_array_equal(importance_correction(-ones, sampling, ones), [[1]])


GAPS = np.log([[2.0, 4.0, 9.0], [0.25, 0.5, 9.0]])


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", {}, [[2, 3, 1], [0.25, 0.5, 1]]),
        ("token_truncate", {"clip_min": 0.4, "clip_max": None}, [[2, 4, 1], [0.4, 0.5, 1]]),
        ("token_mask", {}, [[2, 0, 1], [0.25, 0.5, 1]]),
        ("token_mask", {"clip_min": 0.4}, [[2, 0, 1], [0, 0.5, 1]]),
        ("sequence_truncate", {}, [[3], [0.125]]),
        ("sequence_mask", {}, [[0], [0.125]]),
    ],
)
def test_the_correction_for_another_sampler_by_hand(mode, bounds, expected):
    mask = jnp.array([[1, 1, 0], [1, 1, 0]])
    close(importance_correction(jnp.asarray(GAPS), jnp.zeros((2, 3)), mask, mode=mode, **bounds), expected)


def test_the_correction_multiplies_the_surrogate_and_not_the_kl():
    mask, zeros = jnp.ones((2, 2), bool), jnp.zeros((2, 2))
    options = {"ref_log_probs": zeros + 0.5, "beta": 0.3, "loss_type": "grpo"}
    advantages, correction = jnp.array([1.0, -2.0]), jnp.array([[0.5], [2.0]])
    loss, metrics = grpo_loss(zeros, None, advantages, mask, correction=correction, **options)
    close(metrics["policy_loss"], -(0.5 * 1 + 2 * -2) / 2)
    close(loss - metrics["policy_loss"], 0.3 * (np.exp(0.5) - 1.5))


def test_the_kl_is_masked_by_no_selection():
    zeros, advantages = jnp.zeros((2, 2)), jnp.array([-1.0, -1.0])
    options = {"ref_log_probs": zeros + 0.5, "beta": 0.3, "sampling_log_probs": zeros + 5}
    nothing = {"entropy_mask": zeros, "off_policy_mask_threshold": 1.0}
    loss, metrics = grpo_loss(zeros, None, advantages, zeros == 0, **options, **nothing)
    assert metrics["policy_loss"] == 0
    close(loss, 0.3 * (np.exp(0.5) - 1.5))


def test_the_entropy_bonus_is_the_mean_over_the_tokens_that_are_learned_from():
    zeros, entropy = jnp.zeros((1, 4)), jnp.array([[1.0, 2, 3, 4]])
    options = {"entropy": entropy, "entropy_coef": 0.1, "loss_type": "grpo"}
    advantage, mask = jnp.zeros(1), jnp.ones((1, 4))
    loss, metrics = grpo_loss(zeros, None, advantage, mask, top_entropy_quantile=0.5, **options)
    close(loss, -0.1 * 3.5)
    close(metrics["entropy"], 2.5)
    kept = top_entropy_mask(entropy, mask, 0.5)
    made = grpo_weights(mask, "grpo", entropy_mask=kept)
    close(grpo_loss(zeros, None, advantage, mask, weights=made, entropy_mask=kept, **options)[0], loss)
    weights = grpo_weights(mask, "grpo")
    with pytest.raises(ValueError, match=r"weights.entropy is missing.*entropy_mask=entropy_mask"):
        grpo_loss(zeros, None, advantage, mask, weights=weights, entropy_mask=kept, **options)


def test_a_quantile_of_a_batch_that_may_be_split_is_refused():
    zeros = jnp.zeros((1, 4))
    for quantile in (0.2, jnp.asarray(0.2)):
        with pytest.raises(ValueError, match=r"top_entropy_quantile=0.2.* came with weights.*entropy_mask="):
            grpo_loss(zeros, None, jnp.zeros(1), zeros, entropy=zeros, top_entropy_quantile=quantile, weights=zeros)


def test_truncated_completions_are_masked_whatever_ends_the_others():
    ids = jnp.array([[5, 9, 9], [5, 6, 7], [5, 6, 8], [9, 5, 6], [0, 0, 0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]])
    kept = mask_truncated_completions(ids, mask, jnp.array([8, 9]))
    np.testing.assert_array_equal(kept, np.where([[1], [0], [1], [0], [0]], mask, 0))
    np.testing.assert_array_equal(mask_truncated_completions(ids, mask, 8).any(-1), [0, 0, 1, 0, 0])
    weights = grpo_weights(kept, "dapo").policy
    close(weights[2], 1 / 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: importance_correction(x, x, x, mode="rows"), r"mode must be one of .*'token_mask'.*, got 'rows'"),
        (
            lambda x: importance_correction(x, x, x, mode="token_truncate", clip_max=None),
            r"needs clip_min or clip_max.* got neither",
        ),
        (lambda x: grpo_loss(x, None, x, x, top_entropy_quantile=0.5), r"top_entropy_quantile=0.5 needs entropy"),
    ],
)
def test_errors_name_the_argument_and_the_cure(call, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        call(jnp.ones((1, 2)))
