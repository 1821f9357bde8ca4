import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import ActorCritic, QNetwork


def init(model, *shape, seed=0):
    return model.init(jax.random.key(seed), jnp.zeros(shape))["params"]


def test_logits_and_values_keep_any_batch_axes():
    model = ActorCritic(num_actions=3)
    params = init(model, 1, 4)
    for batch in ((), (5,), (7, 2)):
        logits, value = model.apply({"params": params}, jnp.zeros((*batch, 4)))
        assert logits.shape == (*batch, 3)
        assert value.shape == batch


def test_the_networks_are_the_equations():
    model = ActorCritic(num_actions=2, hidden_sizes=(8, 5))
    params = jax.tree.map(np.asarray, init(model, 1, 4))
    observation = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    logits, value = model.apply({"params": params}, jnp.asarray(observation))

    def forward(layers):
        x = np.tanh(observation @ layers["hidden_0"]["kernel"] + layers["hidden_0"]["bias"])
        x = np.tanh(x @ layers["hidden_1"]["kernel"] + layers["hidden_1"]["bias"])
        return x @ layers["output"]["kernel"] + layers["output"]["bias"]

    np.testing.assert_allclose(logits, forward(params["policy"]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, forward(params["value"])[:, 0], rtol=1e-4, atol=1e-6)


def test_weights_start_orthogonal_with_the_gains_of_ppo_and_biases_start_at_zero():
    params = init(ActorCritic(num_actions=2), 1, 4)
    for network, gain in (("policy", 0.01), ("value", 1.0)):
        kernel = params[network]["hidden_1"]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-5)
        output = params[network]["output"]["kernel"]
        np.testing.assert_allclose(output.T @ output, gain**2 * np.eye(output.shape[1]), atol=1e-5 * gain**2)
        np.testing.assert_array_equal(params[network]["hidden_0"]["bias"], 0)


def test_at_the_start_all_actions_are_about_equally_likely():
    model = ActorCritic(num_actions=4)
    observation = jax.random.normal(jax.random.key(1), (100, 6))
    logits, _ = model.apply({"params": init(model, 1, 6)}, observation)
    np.testing.assert_allclose(jax.nn.softmax(logits), 0.25, atol=0.02)


def test_whole_numbers_are_read_as_floats():
    model = ActorCritic(num_actions=3)
    params = init(model, 1, 50)
    board = jax.random.bernoulli(jax.random.key(1), shape=(2, 7, 50)).astype(jnp.int32)
    logits, value = model.apply({"params": params}, board)
    assert logits.shape == (2, 7, 3)
    as_float = model.apply({"params": params}, board.astype(jnp.float32))
    np.testing.assert_array_equal(value, as_float[1])


@pytest.mark.parametrize("shared", [False, True])
def test_the_value_loss_moves_the_policy_only_through_a_shared_trunk(shared):
    model = ActorCritic(num_actions=2, hidden_sizes=(16,), activation=jax.nn.relu, shared_trunk=shared)
    params = init(model, 1, 4)
    observation = jax.random.normal(jax.random.key(1), (8, 4))

    def logits_after_a_step_on_values(params):
        grads = jax.grad(lambda p: (model.apply({"params": p}, observation)[1] ** 2).sum())(params)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return model.apply({"params": moved}, observation)[0]

    changed = np.abs(logits_after_a_step_on_values(params) - model.apply({"params": params}, observation)[0]).max() > 0
    assert changed == shared
    assert set(params) == ({"trunk", "policy", "value"} if shared else {"policy", "value"})


def test_a_gaussian_policy_has_a_mean_and_deviations_that_do_not_depend_on_the_observation():
    model = ActorCritic(num_actions=3, continuous=True)
    params = init(model, 1, 4)
    params["log_std"] = jnp.array([0.1, 0.2, 0.3])
    (mean, log_std), value = model.apply({"params": params}, jax.random.normal(jax.random.key(1), (7, 2, 4)))
    assert mean.shape == log_std.shape == (7, 2, 3)
    assert value.shape == (7, 2)
    np.testing.assert_array_equal(log_std, jnp.broadcast_to(params["log_std"], log_std.shape))
    assert mean.std() > 0


@pytest.mark.parametrize("dueling", [False, True])
def test_action_values_are_the_equations(dueling):
    model = QNetwork(num_actions=3, hidden_sizes=(8,), dueling=dueling)
    params = init(model, 1, 4)
    observation = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    q = model.apply({"params": params}, jnp.asarray(observation))
    first = params["trunk" if dueling else "values"]["hidden_0"]
    hidden = np.maximum(observation @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)
    heads = {k: hidden @ np.asarray(v["output"]["kernel"]) for k, v in params.items() if "output" in v}
    expected = heads["values"] if not dueling else 0
    if dueling:
        expected = heads["value"] + heads["advantage"] - heads["advantage"].mean(1, keepdims=True)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-5)
