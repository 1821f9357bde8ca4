import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from jaxrl_llm import log_probs
from jaxrl_llm.log_probs import chunked_token_statistics, token_entropy, token_log_probs, token_statistics
from jaxrl_llm.training.parallel import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)


def floats_of(statistics):
    """All but `is_argmax`, which has no gradient."""
    return *statistics[:4], statistics.log_sum_sq_probs


# Vectors of rlax (rlax/_src/distributions_test.py).
@pytest.mark.parametrize(
    ("logits", "temperature", "probs"),
    [
        ([[1, 1, 0], [1, 2, 0]], 10, [[0.34425336, 0.34425336, 0.31149334], [0.332225, 0.3671654, 0.3006096]]),
        ([[1, 1, 0], [1, 2, 0]], 1, [[0.42231882, 0.42231882, 0.15536241], [0.24472848, 0.66524094, 0.09003057]]),
    ],
)
def test_log_probs_and_entropy_equal_rlax(logits, temperature, probs):
    logits, probs = jnp.array(logits, jnp.float32), np.array(probs)
    for action in range(3):
        log_probs = token_log_probs(logits, jnp.full(2, action), temperature=temperature)
        close(log_probs, np.log(probs[:, action]), atol=1e-6)
    close(token_entropy(logits, temperature=temperature), -(probs * np.log(probs)).sum(-1), atol=1e-6)


def test_cross_entropies_equal_rlax():
    log_probs = token_log_probs(jnp.array([[10, 1, -2], [1, 4, 0.2]]), jnp.array([1, 0]))
    close(-log_probs, [9.00013, 3.0696733])


def test_log_probs_equal_tunix():
    # tunix/tests/rl/common_test.py draws logits and tokens with one key, and with the older layout of random bits.
    with jax.threefry_partitionable(False), jax.debug_key_reuse(False):
        key = jax.random.PRNGKey(0)
        logits, tokens = jax.random.uniform(key, (2, 4, 8)), jax.random.randint(key, (2, 4), 0, 8)
    expected = [
        [-2.242679, -2.2733693, -2.1024966, -1.9994389],
        [-2.0603075, -2.4863663, -1.9176172, -2.0206313],
    ]
    close(token_log_probs(logits, tokens), expected)


def test_all_statistics_by_hand():
    probs = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    statistics = jax.jit(token_statistics)(jnp.log(probs) + 3, jnp.array([0, 1]))
    close(statistics.log_probs, np.log([0.5, 0.2]))
    close(statistics.entropy, -(probs * np.log(probs)).sum(-1))
    close(statistics.logsumexp, [3, 3])
    close(statistics.mean_log_probs, np.log(probs).mean(-1))
    assert statistics.is_argmax.tolist() == [True, False]
    close(statistics.log_sum_sq_probs, np.log((probs**2).sum(-1)))


LOGITS = hnp.arrays(np.float32, (2, 4, 5), elements=st.floats(-20, 20, width=32))
TOKENS = hnp.arrays(np.int32, (2, 4), elements=st.integers(0, 4))
TEMPERATURES = st.floats(0.25, 4, width=32)


@jax.jit
def statistics_and_parts(logits, tokens, temperature):
    parts = token_log_probs(logits, tokens, temperature=temperature), token_entropy(logits, temperature=temperature)
    reference = jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), tokens[..., None], -1)[..., 0]
    return token_statistics(logits, tokens, temperature=temperature), parts, reference


@given(LOGITS, TOKENS, TEMPERATURES)
def test_log_probs_are_those_of_the_softmax(logits, tokens, temperature):
    statistics, parts, reference = jax.device_get(statistics_and_parts(logits, tokens, temperature))
    close(statistics.log_probs, reference, atol=1e-6)
    close(statistics[:2], parts, atol=1e-6)
    assert (statistics.log_probs <= 0).all()
    assert (statistics.log_sum_sq_probs <= 1e-6).all()
    # The mean of log p under p is at most the log of its mean (Jensen).
    assert (-statistics.entropy <= statistics.log_sum_sq_probs + 1e-5).all()
    assert (statistics.entropy >= -1e-6).all()
    assert (statistics.entropy <= np.log(5) + 1e-6).all()


@given(LOGITS, TOKENS, st.floats(-100, 100, width=32))
def test_a_shift_of_the_logits_changes_the_normaliser_alone(logits, tokens, shift):
    plain, *_ = jax.device_get(statistics_and_parts(logits, tokens, 1.0))
    moved, *_ = jax.device_get(statistics_and_parts(logits + shift, tokens, 1.0))
    close(moved.logsumexp - shift, plain.logsumexp, rtol=1e-5, atol=1e-4)
    for name in ("log_probs", "entropy", "mean_log_probs", "log_sum_sq_probs"):
        close(getattr(moved, name), getattr(plain, name), rtol=1e-4, atol=1e-3, err_msg=name)


def test_logits_far_from_zero_lose_no_digits():
    logits = np.random.default_rng(0).normal(size=(50, 100)) * 2
    far = jnp.asarray((logits - 128).astype(np.float32))
    exact = np.asarray(far, np.float64)
    log_softmax = exact - np.log(np.exp(exact + 128).sum(-1, keepdims=True)) + 128
    statistics = jax.jit(token_statistics)(far, jnp.zeros(50, int))
    close(statistics.log_probs, log_softmax[:, 0])
    close(statistics.entropy, -(np.exp(log_softmax) * log_softmax).sum(-1))
    close(statistics.mean_log_probs, log_softmax.mean(-1))
    close(statistics.log_sum_sq_probs, np.log(np.exp(2 * log_softmax).sum(-1)))


def test_half_precision_logits_are_scored_in_single_precision():
    logits = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    for x in floats_of(token_statistics(logits, jnp.array([0]))):
        assert x.dtype == jnp.float32
    close(token_log_probs(logits, jnp.array([0])), token_log_probs(logits.astype(jnp.float32), jnp.array([0])))


EXTREMES = jnp.array([[0.0, -jnp.inf, 1.0], [1e4, -1e4, 0.0], [-jnp.inf, 5.0, -jnp.inf]])


def test_statistics_and_gradients_are_finite_at_extremes():
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(logits):
        statistics = token_statistics(logits, jnp.array([2, 0, 1]))
        return sum(x.sum() for x in floats_of(statistics)), statistics

    (_, statistics), grad = total(EXTREMES)
    chex.assert_tree_all_finite((statistics, grad))
    close(statistics.entropy[1:], [0, 0], atol=1e-6)
    assert not grad[-jnp.inf == EXTREMES].any()


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))

        @jax.jit
        def floats(logits, temperature):
            return floats_of(token_statistics(logits, jnp.array([0, 3, 4]), temperature=temperature))

        check_grads(floats, (logits, jnp.asarray(0.7)), order=1, modes="rev", atol=1e-7, rtol=1e-7)


# From hidden states, a chunk at a time


def inputs(leading, time=7, hidden=4, vocab=11):
    rng = np.random.default_rng(len(leading))
    shape = (*leading, time)
    arrays = rng.normal(size=(*shape, hidden)), rng.normal(size=(hidden, vocab)), rng.normal(size=(5, *shape))
    states, kernel, cotangents = (x.astype(np.float32) for x in arrays)
    return states, kernel, rng.integers(0, vocab, shape), cotangents


@functools.partial(jax.jit, static_argnames="chunk_size")
def value_and_gradient(hidden, kernel, tokens, cotangents, temperature, chunk_size=None):
    """Of all statistics, through random cotangents; dense where no chunk size is given."""

    def total(hidden, kernel, temperature):
        if chunk_size is None:
            statistics = token_statistics(hidden @ kernel, tokens, temperature=temperature)
        else:
            options = {"temperature": temperature, "chunk_size": chunk_size}
            statistics = chunked_token_statistics(hidden, kernel, tokens, **options)
        return jnp.sum(jnp.stack(floats_of(statistics)) * cotangents), statistics

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, kernel, temperature)


@pytest.mark.parametrize("block", [2048, 4, 1])
@pytest.mark.parametrize(
    ("leading", "chunk_size"), [((2,), 1), ((2,), 3), ((2,), 7), ((2,), 128), ((), 3), ((3, 2), 4)]
)
def test_chunked_equals_dense_in_value_and_gradient(leading, chunk_size, block, monkeypatch):
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", block)
    value_and_gradient.clear_cache()
    arrays = inputs(leading)
    for temperature in (0.7, 1.0, 2.0):
        (_, dense), dense_grads = value_and_gradient(*arrays, temperature)
        (_, chunked), chunked_grads = value_and_gradient(*arrays, temperature, chunk_size=chunk_size)
        chex.assert_trees_all_close(chunked, dense, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(chunked_grads, dense_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [2048, 4, 1])
def test_a_divided_vocabulary_has_the_statistics_of_a_whole_one(block, monkeypatch):
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", block)
    value_and_gradient.clear_cache()
    hidden, kernel, tokens, cotangents = inputs((2,), vocab=12)
    (_, dense), dense_grads = value_and_gradient(hidden, kernel, tokens, cotangents, 0.7)
    with jax.set_mesh(make_mesh(tensor=2)):
        divided = jax.device_put(kernel, jax.sharding.PartitionSpec(None, "tensor"))
        (_, chunked), chunked_grads = value_and_gradient(hidden, divided, tokens, cotangents, 0.7, chunk_size=3)
    chex.assert_trees_all_close(chunked, dense, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(chunked_grads, dense_grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab", "parts"), [(388, 4), (98, 2), (128, 8)])
def test_each_device_scores_its_part_of_a_divided_vocabulary(vocab, parts, monkeypatch):
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 30)
    with jax.set_mesh(make_mesh(tensor=parts)):
        kernel = jax.device_put(jnp.zeros((5, vocab)), jax.sharding.PartitionSpec(None, "tensor"))
        arrays = jnp.zeros((2, 7, 5)), kernel, jnp.zeros((2, 7), int)
        text = jax.jit(lambda *arrays: chunked_token_statistics(*arrays).log_probs).lower(*arrays).compile().as_text()
    assert not [shape for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text) if "5" in shape.split(",")]


def test_blocks_have_the_forward_and_second_derivatives_of_the_dense_form(monkeypatch):
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 4)
    hidden, kernel, tokens, _ = map(jnp.asarray, inputs((2,)))
    tangent = np.random.default_rng(1).normal(size=hidden.shape).astype(np.float32)

    def derivatives(score):
        forward = jax.jvp(score, (hidden,), (tangent,))[1]
        return forward, jax.jvp(jax.grad(lambda hidden: score(hidden).sum()), (hidden,), (tangent,))[1]

    dense = jax.jit(lambda: derivatives(lambda hidden: token_log_probs(hidden @ kernel, tokens)))()
    blocks = jax.jit(lambda: derivatives(lambda hidden: chunked_token_statistics(hidden, kernel, tokens).log_probs))()
    chex.assert_trees_all_close(blocks, dense, rtol=1e-5, atol=1e-5)


def test_tokens_out_of_range_score_as_in_the_dense_form():
    hidden, kernel, _, _ = inputs((2,))
    tokens = jnp.array([[0, 10, 11, -1, -11, -12, 300]] * 2)
    chunked = jax.jit(chunked_token_statistics)(hidden, kernel, tokens).log_probs
    close(chunked, jax.jit(token_log_probs)(hidden @ kernel, tokens), atol=1e-6)
    assert np.isnan(np.asarray(chunked[0])).tolist() == [False, False, True, False, False, True, True]


def every_jaxpr(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(parameter, "jaxpr") or hasattr(parameter, "eqns"):
                yield from every_jaxpr(getattr(parameter, "jaxpr", parameter))


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_chunks_never_hold_the_logits_of_the_whole_batch(chunk_size):
    batch, time, hidden, vocab = 2, 64, 3, 101
    arrays = inputs((batch,), time, hidden, vocab)
    program = jax.make_jaxpr(functools.partial(value_and_gradient, chunk_size=chunk_size))(*arrays, 1.0)
    made = [v.aval.size for jaxpr in every_jaxpr(program.jaxpr) for e in jaxpr.eqns for v in e.outvars]
    assert (max(made) >= batch * time * vocab) == (chunk_size is None)


def test_of_equally_likely_tokens_the_first_is_the_argmax_in_whatever_block(monkeypatch):
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 2)
    kernel = jnp.array([[0.0, 1.0, 2.0, 2.0, 1.0, 2.0, 0.0]])
    found = [
        bool(chunked_token_statistics(jnp.ones((1, 1)), kernel, jnp.array([token])).is_argmax[0]) for token in range(7)
    ]
    assert found == [False, False, True, False, False, False, False]


def test_memory_does_not_grow_with_the_vocabulary_but_for_the_kernel_and_its_gradient():
    width = 64
    hidden, tokens = jnp.zeros((8, 128, width)), jnp.zeros((8, 128), int)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(hidden, kernel):
        return chunked_token_statistics(hidden, kernel, tokens).log_probs.sum()

    sizes = 4_096, 32_768
    small, large = (
        loss.lower(hidden, jnp.zeros((width, vocab))).compile().memory_analysis().temp_size_in_bytes for vocab in sizes
    )
    growth = (large - small) / (sizes[1] - sizes[0]) / 4
    assert growth < 2.5 * width, "numbers for each token of the vocabulary; all logits would be 1,024"


def test_no_positions_are_no_work():
    statistics = chunked_token_statistics(jnp.zeros((2, 0, 3)), jnp.zeros((3, 5)), jnp.zeros((2, 0), int))
    assert {x.shape for x in statistics} == {(2, 0)}


def test_chunks_of_half_precision_states_are_scored_in_single_precision():
    hidden, kernel, tokens, _ = inputs((2,))
    half = jnp.asarray(hidden, jnp.bfloat16)
    statistics = jax.jit(chunked_token_statistics)(half, kernel, tokens)
    assert {x.dtype for x in floats_of(statistics)} == {jnp.dtype("float32")}
    dense = jax.jit(token_statistics)(hidden @ kernel, tokens)
    close(statistics.log_probs, dense.log_probs, atol=0.1)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_has_at_least_one_position(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1 position, got {chunk_size}"):
        chunked_token_statistics(jnp.zeros((2, 4, 3)), jnp.zeros((3, 5)), jnp.zeros((2, 4), int), chunk_size=chunk_size)
