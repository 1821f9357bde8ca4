"""Filters by hand, against a plain implementation of transformers' definitions, and at their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxrl_llm.rollouts import sampling
from jaxrl_llm.rollouts.sampling import (
    filter_logits,
    is_off,
    left_pad,
    most_likely_tokens,
    penalize_repetition,
    sample_tokens,
)

PROBS = [0.2, 0.4, 0.1, 0.3]

filter_traced = jax.jit(filter_logits, static_argnames="top_k")
penalize = jax.jit(penalize_repetition)
draw = jax.jit(sample_tokens)


def log(*rows):
    return jnp.log(jnp.array(rows))


def support(logits):
    """The tokens that may be sampled, for each row."""
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in np.asarray(logits)]


def transformers_support(logits, top_k, top_p, min_p):
    """What transformers keeps of one row: its warpers in their order, in float64, with loops in place of masks."""
    kept = set(range(len(logits)))

    def probs():
        weights = np.array([np.exp(logits[i] - max(logits)) if i in kept else 0.0 for i in range(len(logits))])
        return weights / weights.sum()

    if top_k:
        threshold = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = {i for i in kept if logits[i] >= threshold}
    cumulative, before = 0.0, probs()
    for i in sorted(kept, key=lambda i: logits[i])[:-1]:  # from the least likely up; the last one always stays
        cumulative += before[i]
        if cumulative <= 1 - top_p:
            kept.discard(i)
    return {i for i in kept if probs()[i] >= min_p * probs().max()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 50}, {0, 1, 2, 3}),
        # most likely first: 0.4, 0.7, 0.9, 1
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {0, 1, 3}),
        ({"top_p": 0.91}, {0, 1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        # as shares of the most likely: 0.5, 1, 0.25, 0.75
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.24}, {0, 1, 2, 3}),
        ({"min_p": 0.26}, {0, 1, 3}),
        ({"min_p": 0.51}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # the nucleus is of what top-k left, 4/7 and 3/7
        ({"top_p": 0.5}, {1, 3}),
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_p": 0.71, "min_p": 0.51}, {1, 3}),
        ({"top_k": 3, "top_p": 0.95, "min_p": 0.4}, {0, 1, 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("filters", [filter_logits, filter_traced], ids=["static", "traced"])
def test_the_supports_are_as_computed_by_hand(filters, settings, expected):
    logits = log(PROBS, PROBS[::-1])
    found = filters(logits, **settings)
    assert support(found) == [expected, {3 - i for i in expected}]
    np.testing.assert_array_equal(found, np.where(found > -np.inf, logits, -np.inf))


@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 7, 40]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_the_supports_on_random_logits_are_those_of_transformers(seed, spread, top_k, top_p, min_p):
    logits = np.random.RandomState(seed).normal(0, spread, (4, 40)).astype(np.float32)
    found = filter_traced(jnp.asarray(logits), top_k=top_k, top_p=top_p, min_p=min_p)
    assert support(found) == [transformers_support(row.astype(np.float64), top_k, top_p, min_p) for row in logits]


def test_tokens_as_likely_as_the_last_one_kept_are_kept_too():
    tied = log([0.4, 0.2, 0.2, 0.2])
    assert support(filter_logits(tied, top_k=2)) == [{0, 1, 2, 3}]
    assert support(filter_logits(tied, top_p=0.5)) == [{0, 1, 2, 3}]
    assert support(filter_logits(tied, top_p=0.3)) == [{0}]


def test_the_neutral_value_of_a_traced_filter_keeps_the_far_tail():
    logits = jnp.linspace(0, -80, 2000)[None]  # probabilities down to 1e-37: their sum is one long before the end
    found = filter_traced(logits, top_p=1.0, min_p=0.0)
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_most_likely_token_survives_every_filter(settings):
    """Also a nucleus of nothing, which cannot be refused when it is traced."""
    rows = [[0.0, 3.0, -1.0], [-jnp.inf, 1e4, -1e4], [-jnp.inf, -2.0, -jnp.inf], [-1e38, 1e38, 0.0]]
    assert support(filter_traced(jnp.array(rows), **settings)) == [{1}] * 4


def test_numbers_that_change_nothing_are_told_from_those_that_might():
    assert is_off(1, 1.0)
    assert not is_off(0.9, 1.0)
    assert not is_off(jnp.ones(()), 1.0), "a traced number may change"


def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    logits = jnp.array([[2.0, -1.0, 0.0, 3.0, -4.0], [2.0, -1.0, 0.0, 3.0, -4.0]])
    history = jnp.array([[0, 1, 2], [4, 4, 3]])
    real = jnp.array([[True, True, True], [True, True, True]])
    expected = [
        [1.0, -2.0, 0.0, 3.0, -4.0],  # 2 / 2, -1 · 2, 0
        [2.0, -1.0, 0.0, 1.5, -8.0],  # token 4 came twice and is penalised once
    ]
    np.testing.assert_array_equal(penalize(logits, history, real, 2.0), np.array(expected))
    np.testing.assert_array_equal(penalize(logits, history, real, 1.0), logits)


@pytest.mark.parametrize("pad", [0, 4, 5, -1, 2**31 - 1])
def test_padding_is_never_penalised_whatever_its_id(pad):
    logits = jnp.array([[2.0, -1.0, 1.0, 3.0, -4.0], [2.0, -1.0, 1.0, 3.0, -4.0]])
    history = jnp.array([[pad, 3, pad], [0, pad, pad]])
    real = jnp.array([[False, True, False], [True, False, False]])
    expected = [[2.0, -1.0, 1.0, 1.5, -4.0], [1.0, -1.0, 1.0, 3.0, -4.0]]
    np.testing.assert_array_equal(penalize(logits, history, real, 2.0), np.array(expected))


@functools.cache
def compiled_left_pad():
    return jax.jit(left_pad)


@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from([bool, np.int32, np.float32]),
)
def test_left_padding_moves_real_tokens_to_the_end_in_their_order(seed, share, dtype):
    draw = np.random.RandomState(seed)
    ids, mask = draw.randint(0, 100, (3, 7)), draw.uniform(size=(3, 7)) < share
    moved, real = compiled_left_pad()(jnp.asarray(ids), jnp.asarray(mask.astype(dtype)))
    assert real.dtype == bool
    for row in range(3):
        count = mask[row].sum()
        np.testing.assert_array_equal(real[row], np.arange(7) >= 7 - count)
        np.testing.assert_array_equal(moved[row, 7 - count :], ids[row, mask[row]])
    again = compiled_left_pad()(moved, real)
    np.testing.assert_array_equal(again[0], moved)
    np.testing.assert_array_equal(again[1], real)


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocab):
    probs = np.random.default_rng(vocab).dirichlet(np.full(vocab, 0.3))
    draws = 20_000
    keys = jax.random.split(jax.random.key(vocab), draws)
    tokens, log_probs = map(np.asarray, draw(keys, jnp.broadcast_to(jnp.log(probs) - 3, (draws, vocab))))
    np.testing.assert_allclose(log_probs, np.log(probs)[tokens], rtol=0, atol=1e-5)
    assert tokens.min() >= 0
    assert tokens.max() < vocab
    expected = probs * draws
    common = expected >= 5
    counts = np.bincount(tokens, minlength=vocab)
    square = ((counts - expected) ** 2 / expected)[common].sum()
    rest = (counts[~common].sum() - expected[~common].sum()) ** 2 / max(expected[~common].sum(), 1)
    assert square + rest < stats.chi2.ppf(0.9999, common.sum())


@pytest.mark.parametrize("allowed", [[0], [255], [256], [511, 512], [999], [3, 700]])
def test_a_token_that_may_not_be_sampled_never_is(allowed):
    logits = np.full((5000, 1000), -np.inf, np.float32)
    logits[:, allowed] = np.linspace(-90, -89, len(allowed))
    tokens = np.asarray(draw(jax.random.split(jax.random.key(1), 5000), jnp.asarray(logits))[0])
    assert set(tokens.tolist()) == set(allowed)


def test_the_largest_random_number_draws_the_last_possible_token():
    weights = jnp.array([[0.1, 0.2, 0.7, 0.0], [0.0, 1e-9, 0.0, 0.0], [3.0, 1e-8, 0.0, 1e-30]], jnp.float32)
    below_one = jnp.full(3, np.nextafter(np.float32(1), np.float32(0)))
    drawn = np.asarray(sampling._draw(weights, below_one))
    assert drawn[0] == 2
    assert drawn[1] == 1
    assert weights[2, drawn[2]] > 0
    np.testing.assert_array_equal(sampling._draw(weights, jnp.zeros(3)), [0, 1, 0])


def test_the_most_likely_token_is_the_first_of_equals():
    logits = jnp.array([[1.0, 5.0, 5.0], [-jnp.inf, -jnp.inf, -2.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(most_likely_tokens(logits), jnp.argmax(logits, axis=-1))
