import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.divergences import chunked_generalized_jsd
from jaxrl_llm.losses import distillation_loss, token_mean_divergence

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
STUDENT, TEACHER = jnp.log(jnp.array([[[0.9, 0.1], [0.1, 0.9]]])), jnp.log(jnp.array([[[0.2, 0.8], [0.1, 0.9]]]))
MASK = jnp.array([[1, 1]])


def kl(p, q):
    p, q = np.array(p), np.array(q)
    return np.sum(p * np.log(p / q))


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, kl([0.2, 0.8], [0.9, 0.1])),
        (1.0, kl([0.9, 0.1], [0.2, 0.8])),
        (0.25, 0.25 * kl([0.2, 0.8], [0.725, 0.275]) + 0.75 * kl([0.9, 0.1], [0.725, 0.275])),
    ],
)
def test_distillation_loss_by_hand(beta, expected):
    loss, metrics = distillation_loss(STUDENT, TEACHER, MASK, beta=beta)
    close(loss, expected / 2)  # The second token agrees.
    close(metrics["jsd"], loss)
    close(distillation_loss(STUDENT, TEACHER, jnp.array([[1, 0]]), beta=beta)[0], expected)


def test_the_teacher_is_a_constant():
    grads = jax.grad(lambda *x: distillation_loss(*x, MASK)[0], argnums=(0, 1))(STUDENT, TEACHER)
    assert grads[0].any()
    assert not grads[1].any()


def test_the_forward_kl_has_the_gradient_of_cross_entropy_with_soft_targets():
    def cross_entropy(student):
        return -jnp.mean(jnp.sum(jax.nn.softmax(TEACHER) * jax.nn.log_softmax(student), -1))

    grad = jax.grad(lambda student: distillation_loss(student, TEACHER, MASK, beta=0.0)[0])(STUDENT)
    close(grad, jax.grad(cross_entropy)(STUDENT), atol=1e-7)


def test_from_hidden_states_the_loss_is_the_same():
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 5, 3)).astype(np.float32), rng.normal(size=(3, 7)).astype(np.float32)
    teacher_hidden, teacher_kernel = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, 7))
    teacher = jnp.asarray(teacher_hidden, jnp.float32), jnp.asarray(teacher_kernel, jnp.float32)
    mask = jnp.asarray(np.arange(5) < np.array([[4], [2]]))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def chunked(hidden, kernel):
        divergences = chunked_generalized_jsd(hidden, kernel, *teacher, beta=0.3, temperature=1.5, chunk_size=2)
        return token_mean_divergence(divergences, mask)[0]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def dense(hidden, kernel):
        return distillation_loss(hidden @ kernel, teacher[0] @ teacher[1], mask, beta=0.3, temperature=1.5)[0]

    jax.tree.map(functools.partial(close, rtol=1e-5, atol=1e-6), chunked(hidden, kernel), dense(hidden, kernel))
