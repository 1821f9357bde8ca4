import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.training import sync_reference


def trees(seed):
    random = np.random.default_rng(seed)
    return {"kernel": random.normal(size=(2, 3)).astype("float32"), "bias": random.normal(size=3).astype("float32")}


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_reference_is_mixed_in_every_so_many_steps_and_else_stays(alpha):
    ours = jax.tree.map(jnp.asarray, trees(0))
    theirs = trees(0)
    for step in range(1, 8):
        policy = trees(step)
        ours = sync_reference(ours, policy, jnp.int32(step), mixup_alpha=alpha, sync_steps=3)
        if step in (3, 6):
            theirs = {name: alpha * policy[name] + (1 - alpha) * value for name, value in theirs.items()}
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=f"{name} at step {step}")


def test_alpha_and_the_steps_between_may_be_traced():
    reference, policy = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    alphas, steps = jnp.array([0.25, 0.5]), jnp.array([2, 3])
    mixed = jax.vmap(
        lambda alpha, every: sync_reference(reference, policy, jnp.int32(4), mixup_alpha=alpha, sync_steps=every)
    )(alphas, steps)
    np.testing.assert_allclose(mixed["w"], [[0.25, 0.25], [0, 0]])
