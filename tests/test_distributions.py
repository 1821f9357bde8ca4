import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.distributions import Categorical, DiagonalGaussian, make_distribution

close = np.testing.assert_allclose


def gaussian(mean, std):
    return DiagonalGaussian(jnp.array(mean), jnp.log(jnp.array(std)))


def test_a_gaussian_has_the_densities_entropies_and_divergences_of_rlax_s_tests():
    policy = gaussian([[1.0, -1.0], [0.1, -0.1]], [[0.1, 0.1], [0.2, 0.3]])
    close(policy.log_prob(jnp.array([[1.2, -1.1], [-0.1, 0.0]])), [0.26729202, 0.41997814], rtol=1e-5)
    close(policy.entropy(), [-1.7672932, 0.02446628], rtol=1e-4)
    close(policy.kl(gaussian([[1.0, -10.0], [0.3, -0.2]], [[0.1, 0.1], [0.8, 0.3]])), [4050.0, 1.00435], rtol=1e-5)
    other = gaussian([[0.005, -11.0], [-0.25, -0.2]], [[0.1, 0.1], [0.6, 0.3]])
    close(gaussian([[5.0, -1.0], [0.1, -0.1]], [[0.3, 0.1], [0.2, 0.3]]).kl(other), [6250.4023, 0.87986231], rtol=1e-5)


def test_a_categorical_has_the_probabilities_of_rlax_s_tests():
    policy = Categorical(jnp.array([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]]))
    probs = np.array([[0.42231882, 0.42231882, 0.15536241], [0.24472848, 0.66524094, 0.09003057]])
    close(policy.log_prob(jnp.array([0, 1])), np.log([0.42231882, 0.66524094]), rtol=1e-5)
    close(policy.entropy(), -(probs * np.log(probs)).sum(1), rtol=1e-5)
    close(policy.kl(Categorical(policy.logits[::-1])), (probs * np.log(probs / probs[::-1])).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(policy.mode(), [0, 1])


@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (Categorical(jnp.array([0.3, -1.0, 2.0])), Categorical(jnp.array([1.0, 0.0, 0.5]))),
        (gaussian([0.5, -1.0], [0.5, 2.0]), gaussian([0.0, 0.0], [1.0, 1.5])),
    ],
)
def test_samples_have_the_densities_that_are_claimed(policy, other):
    actions = jax.vmap(policy.sample)(jax.random.split(jax.random.key(0), 100_000))
    log_probs = jax.vmap(policy.log_prob)(actions)
    bound = 5 * log_probs.std() / 100_000**0.5
    close(-log_probs.mean(), policy.entropy(), atol=bound)
    difference = log_probs - jax.vmap(other.log_prob)(actions)
    close(difference.mean(), policy.kl(other), atol=5 * difference.std() / 100_000**0.5)
    assert policy.kl(policy) == 0


def test_what_a_network_returns_tells_which_distribution_is_meant():
    assert isinstance(make_distribution(jnp.zeros((2, 3))), Categorical)
    assert isinstance(make_distribution((jnp.zeros(3), jnp.zeros(3))), DiagonalGaussian)
