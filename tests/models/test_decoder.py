"""NEFTune's noise, alone and in both architectures."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import from_pretrained
from jaxrl_llm.models.decoder import embedding_noise

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_noise_is_uniform_with_the_scale_of_the_row_and_none_at_padding():
    real = np.zeros((2, 100), bool)
    real[0], real[1, 60:] = True, True
    noise = np.asarray(embedding_noise(jax.random.key(0), jnp.asarray(real), 64, 5.0))
    np.testing.assert_array_equal(noise[~real], 0)
    for row, length in ((0, 100), (1, 40)):
        bound = 5 / np.sqrt(length * 64)
        drawn = noise[row][real[row]]
        assert np.abs(drawn).max() <= bound
        quantiles = np.quantile(drawn, [0.1, 0.5, 0.9]) / bound
        np.testing.assert_allclose(quantiles, [-0.8, 0, 0.8], atol=0.05)
    assert np.isfinite(embedding_noise(jax.random.key(0), jnp.zeros((1, 3), bool), 4, 5.0)).all()


@functools.cache
def forward(name):
    module, params, _ = from_pretrained(GOLDEN / name)
    module = module.clone(config=module.config.with_dropout(0.0))
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])

    def run(alpha, key, deterministic=False):
        arguments = {"mask": mask, "deterministic": deterministic, "rngs": {"dropout": key}}
        return module.apply({"params": params}, tokens, neftune_noise_alpha=alpha, **arguments)[0]

    return jax.jit(run, static_argnames="deterministic"), golden["logits"], golden["mask"]


@pytest.mark.parametrize("name", ["gpt2_tied", "smollm2"])
def test_noise_changes_the_logits_only_in_training_and_grows_with_alpha(name):
    run, logits, mask = forward(name)

    def distance(alpha, seed=0, **settings):
        return np.abs(run(alpha, jax.random.key(seed), **settings) - logits)[mask].max()

    assert distance(5.0, deterministic=True) < 1e-4
    assert distance(0.0) < 1e-4
    assert 1e-3 < distance(0.1) < distance(5.0)
    assert distance(5.0) == distance(5.0) != distance(5.0, seed=1)
