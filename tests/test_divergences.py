import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from jaxrl_llm.divergences import categorical_kl, chunked_generalized_jsd, generalized_jsd, kl_estimate
from tests.unchecked import unchecked

pytestmark = pytest.mark.usefixtures("quick_compilation")

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-8, 8, width=32))


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_categorical_kl_by_hand(shift):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    close(categorical_kl(jnp.log(p) + shift, jnp.log(q) - shift), (p * np.log(p / q)).sum(), rtol=1e-5)


def test_the_kl_example_of_the_guide():
    # The guide gives the number alone; for a fair coin and one with probabilities 1/2 ± d it is -log(1 - 4d²) / 2.
    d = 0.0401651703
    with jax.enable_x64(True):
        kl = categorical_kl(jnp.zeros(2), jnp.log(jnp.array([0.5 + d, 0.5 - d])))
    close(kl, 0.003236937, rtol=1e-7)


@jax.jit
def exact_and_expected(p, q):
    """The exact divergence, and for each estimator its mean over all outcomes."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    means = {name: jnp.sum(jnp.exp(log_p) * kl_estimate(log_p, log_q, name), -1) for name in ("k1", "k2", "k3")}
    return categorical_kl(p, q), means, kl_estimate(log_p, log_q, "k3")


@given(LOGITS, LOGITS)
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(p, q):
    exact, means, k3 = jax.device_get(exact_and_expected(p, q))
    assert (exact >= -1e-5).all()
    assert (k3 >= 0).all()
    close(means["k1"], exact, rtol=1e-4, atol=1e-5)
    close(means["k3"], exact, rtol=1e-4, atol=1e-4)


def test_k2_has_little_bias_where_the_policies_are_close():
    p = jnp.array([1.0, 0.5, -0.3])
    exact, means, _ = exact_and_expected(p, p + jnp.array([0.02, -0.01, 0.03]))
    close(means["k2"], exact, rtol=0.05)


@given(LOGITS)
def test_every_divergence_from_itself_is_zero(p):
    exact, means, _ = jax.device_get(exact_and_expected(p, p))
    close([exact, *means.values()], 0, atol=1e-6)


def test_as_a_loss_k1_has_no_gradient_in_the_mean_but_k2_and_k3_have_that_of_the_kl():
    p, q = jnp.array([1.0, 0.5, -0.3]), jnp.array([0.2, 0.4, 0.9])

    @functools.partial(jax.jit, static_argnames="estimator")
    def expected_gradient(estimator):
        """Over outcomes drawn from p, which sampling does not differentiate."""

        def loss(logits):
            estimate = kl_estimate(jax.nn.log_softmax(logits), jax.nn.log_softmax(q), estimator)
            return jnp.sum(jax.nn.softmax(p) * estimate)

        return jax.grad(loss)(p)

    gradient = jax.grad(categorical_kl)(p, q)
    assert np.abs(gradient).max() > 0.1
    close(expected_gradient("k1"), 0, atol=1e-7)
    close(expected_gradient("k2"), gradient, rtol=1e-5)
    # That of k3 is the gradient of the other direction, KL(q || p): it has the same minimum.
    close(expected_gradient("k3"), jax.grad(categorical_kl, argnums=1)(q, p), rtol=1e-5)


def test_kl_estimates_equal_tunix():
    # tunix/tests/rl/common_test.py draws with the older layout of random bits, and writes few digits.
    with jax.threefry_partitionable(False):
        keys = jax.random.split(jax.random.PRNGKey(0))
        log_probs, reference = (jax.random.uniform(key, (2, 2, 4)) for key in keys)
    expected = {
        "k1": [0.38486493, 0.7469206, 0.3495195, 0.5621129, -0.4474684, -0.13095665, 0.46064317, -0.19887352],
        "k2": [0.07406051, 0.27894518, 0.06108194, 0.15798548, 0.10011399, 0.00857482, 0.10609607, 0.01977534],
        "k3": [0.0654075, 0.220744, 0.0545462, 0.1321163, 0.1168784, 0.0089617, 0.0915209, 0.0211542],
    }
    for estimator, row in expected.items():
        estimate = kl_estimate(log_probs, reference, estimator)[0].reshape(-1)
        close(estimate, row, atol=1e-7, rtol=1e-6, err_msg=estimator)


def test_outcomes_that_p_excludes_count_as_zero():
    p, q = jnp.array([0.0, -jnp.inf, 0.0]), jnp.array([0.0, 2.0, 0.0])
    kl, grads = jax.value_and_grad(categorical_kl, argnums=(0, 1))(p, q)
    close(kl, np.log((2 + np.e**2) / 2))
    assert np.isfinite(grads).all()
    assert categorical_kl(q, p) == np.inf


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        p, q = (jnp.asarray(rng.normal(size=(2, 5))) for _ in range(2))
        check_grads(jax.jit(categorical_kl), (p, q), order=1, modes="rev", atol=1e-7, rtol=1e-7)
        for estimator in ("k1", "k2", "k3"):
            estimate = jax.jit(functools.partial(kl_estimate, estimator=estimator))
            check_grads(estimate, (p, q), order=1, modes="rev", atol=1e-7, rtol=1e-7)


def test_an_unknown_estimator_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"estimator must be one of .*'k1'.*, got 'k4'"):
        kl_estimate(jnp.zeros(2), jnp.zeros(2), "k4")


# Generalised Jensen-Shannon divergence


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_by_hand(beta):
    student, teacher = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    mixture = beta * teacher + (1 - beta) * student
    of_teacher = np.sum(teacher * np.log(teacher / mixture))
    of_student = np.sum(student * np.log(student / mixture))
    # At the ends one of the two is 0, and the other has the weight 1.
    expected = beta * of_teacher + (1 - beta) * of_student if 0 < beta < 1 else of_teacher + of_student
    close(generalized_jsd(jnp.log(student) + 5, jnp.log(teacher) - 5, beta=beta), expected, rtol=1e-5)


@jax.jit
def jsds(p, q, beta, temperature):
    def jsd(p, q, beta):
        return generalized_jsd(p, q, beta=beta, temperature=temperature)

    return {
        "plain": jsd(p, q, beta),
        "swapped": jsd(q, p, 1 - beta),
        "itself": jsd(p, p, beta),
        "forward": jsd(p, q, 0.0) - categorical_kl(q / temperature, p / temperature),
        "reverse": jsd(p, q, 1.0) - categorical_kl(p / temperature, q / temperature),
    }


@given(LOGITS, LOGITS, st.floats(0, 1, width=32), st.floats(0.5, 2, width=32))
def test_generalized_jsd_is_a_symmetric_divergence_between_the_two_kls(p, q, beta, temperature):
    results = jax.device_get(jsds(p, q, beta, temperature))
    assert (results["plain"] >= -1e-6).all()
    if 0 < beta < 1:  # The entropy of the coin that picks one of the two.
        assert (results["plain"] <= -beta * np.log(beta) - (1 - beta) * np.log1p(-beta) + 1e-6).all()
    close(results["swapped"], results["plain"], rtol=1e-4, atol=1e-5)
    for name in ("itself", "forward", "reverse"):
        close(results[name], 0, atol=1e-5, err_msg=name)


def test_near_its_ends_generalized_jsd_divided_by_beta_is_the_kl():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        p, q = jnp.asarray(rng.normal(size=(2, 5)))
        close(generalized_jsd(p, q, beta=1e-6) / 1e-6, categorical_kl(q, p), rtol=1e-4)
        close(generalized_jsd(p, q, beta=1 - 1e-6) / 1e-6, categorical_kl(p, q), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_outcomes_that_one_or_both_exclude_do_no_harm(beta):
    student, teacher = jnp.array([0.0, 1.0, 2.0, -jnp.inf, -jnp.inf]), jnp.array([0.5, -1.0, -jnp.inf, 0.3, -jnp.inf])
    # What an end needs from the other must be possible there, or the divergence is infinite.
    student = student.at[3].set(0.0) if beta == 0 else student
    teacher = teacher.at[2].set(0.0) if beta == 1 else teacher
    value, grads = jax.jit(jax.value_and_grad(functools.partial(generalized_jsd, beta=beta), argnums=(0, 1)))(
        student, teacher
    )
    chex.assert_tree_all_finite((value, grads))
    close(value, generalized_jsd(student[:4], teacher[:4], beta=beta))
    np.testing.assert_array_equal([grads[0][4], grads[1][4]], 0)


def test_beta_of_generalized_jsd_may_be_traced():
    p, q = jnp.array([1.0, 0.5, -0.3]), jnp.array([0.2, 0.4, 0.9])
    betas = jnp.array([0.0, 0.3, 1.0])
    swept = jax.vmap(lambda beta: jax.value_and_grad(generalized_jsd)(p, q, beta=beta))(betas)
    for i, beta in enumerate((0.0, 0.3, 1.0)):
        expected = jax.value_and_grad(generalized_jsd)(p, q, beta=beta)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], swept), expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_generalized_jsd_equal_finite_differences():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        arguments = jnp.asarray(rng.normal(size=(2, 5))), jnp.asarray(rng.normal(size=(2, 5)))
        for beta in (0.0, 0.3, 1.0):
            jsd = jax.jit(functools.partial(generalized_jsd, beta=beta, temperature=1.5))
            check_grads(jsd, arguments, order=1, modes="rev", atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("leading", "chunk_size"), [((2,), 1), ((2,), 3), ((2,), 128), ((), 3)])
def test_chunked_generalized_jsd_equals_the_dense_one_in_value_and_gradient(leading, chunk_size):
    rng = np.random.default_rng(2)
    shapes = (*leading, 7, 3), (3, 11), (*leading, 7, 4), (4, 11)
    arrays = [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    cotangent = jnp.asarray(rng.normal(size=(*leading, 7)).astype(np.float32))

    @jax.jit
    def both(*arrays):
        def dense(student, student_kernel, teacher, teacher_kernel):
            return generalized_jsd(student @ student_kernel, teacher @ teacher_kernel, beta=0.3, temperature=1.5)

        chunked = functools.partial(chunked_generalized_jsd, beta=0.3, temperature=1.5, chunk_size=chunk_size)
        return [(values, pull(cotangent)) for values, pull in (jax.vjp(f, *arrays) for f in (dense, chunked))]

    chex.assert_trees_all_close(*both(*arrays), rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_compared_in_single_precision():
    p, q = jnp.array([1.0, 0.5, -0.25], jnp.bfloat16), jnp.array([0.25, 0.5, 1.0], jnp.bfloat16)
    single = p.astype(jnp.float32), q.astype(jnp.float32)
    for function in (categorical_kl, generalized_jsd, functools.partial(generalized_jsd, temperature=0.7)):
        assert function(p, q).dtype == jnp.float32
        close(function(p, q), function(*single))
