"""Small Markov decision processes: exact answers by hand, and what Q-learning makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.tabular import (
    MDP,
    action_values,
    expected_return,
    frozen_lake,
    greedy,
    policy_iteration,
    policy_values,
    q_learning,
    value_iteration,
)

close = np.testing.assert_allclose


def corridor(length=4, gamma=0.9):
    """States in a row: action 1 goes right, action 0 left; entering the last, terminal one pays 1. Starts at the left."""
    states = np.arange(length)
    reached = np.eye(length)[np.stack([(states - 1).clip(0), (states + 1).clip(max=length - 1)], axis=1)]
    terminal = (states == length - 1).astype(np.float32)
    return MDP(*map(jnp.asarray, (reached, reached @ terminal, terminal, (states == 0).astype(np.float32))), gamma)


def random_mdp(seed, states=5, actions=3, gamma=0.8):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states) * 0.3, size=(states, actions))
    terminal = (np.arange(states) == 0).astype(np.float32)
    start = (1 - terminal) / (states - 1)
    arrays = transition, rng.normal(size=(states, actions)), terminal, start
    return MDP(*(jnp.asarray(x, jnp.float32) for x in arrays), gamma)


def test_values_of_a_corridor_are_those_by_hand():
    mdp = corridor()
    right = jnp.array([[0.0, 1.0]] * 4)
    close(policy_values(mdp, right), [0.81, 0.9, 1, 0], rtol=1e-6)
    close(expected_return(mdp, right), 0.81, rtol=1e-6)
    best = value_iteration(mdp)
    close(best.values, [0.81, 0.9, 1, 0], rtol=1e-6)
    close(action_values(mdp, best.values)[:3], [[0.729, 0.81], [0.729, 0.9], [0.81, 1]], rtol=1e-6)
    close(action_values(mdp, best.values)[3], 0)
    assert best.policy[:3, 1].all()
    assert best.iterations == 4  # three states, and one iteration that changes nothing


def test_a_random_walk_is_worth_what_the_linear_equations_say():
    # V0 = g/2 (V0 + V1), V1 = g/2 (V0 + V2), V2 = 1/2 + g/2 V1, without discount of the last step's reward.
    values = policy_values(corridor(gamma=0.5), jnp.full((4, 2), 0.5))
    close(values[0], 0.25 * (values[0] + values[1]), rtol=1e-5)
    close(values[1], 0.25 * (values[0] + values[2]), rtol=1e-5)
    close(values[2], 0.5 + 0.25 * values[1], rtol=1e-5)
    close(policy_values(corridor(gamma=1.0), jnp.full((4, 2), 0.5)), [1, 1, 1, 0], rtol=1e-5)


@settings(max_examples=8)
@given(st.integers(0, 1000))
def test_value_and_policy_iteration_agree_and_no_policy_is_better(seed):
    mdp = random_mdp(seed)
    by_value, by_policy = value_iteration(mdp), policy_iteration(mdp)
    close(by_value.values, by_policy.values, atol=2e-5)
    close(policy_values(mdp, by_value.policy), by_value.values, atol=2e-5)
    other = jax.random.dirichlet(jax.random.key(seed), jnp.ones(3), (5,))
    assert (policy_values(mdp, other) <= by_value.values + 1e-5).all()
    assert by_policy.iterations <= 10


def test_values_are_the_mean_of_sampled_returns():
    mdp = random_mdp(3)
    policy = jax.random.dirichlet(jax.random.key(0), jnp.ones(3), (5,))

    def episode(key):
        def step(carry, number):
            state, discount = carry
            action_key, next_key = jax.random.split(jax.random.fold_in(key, number))
            action = jax.random.categorical(action_key, jnp.log(policy[state]))
            reward = discount * mdp.reward[state, action] * (1 - mdp.terminal[state])
            state = jax.random.categorical(next_key, jnp.log(mdp.transition[state, action]))
            return (state, discount * mdp.gamma * (1 - mdp.terminal[state])), reward

        start = jax.random.categorical(jax.random.fold_in(key, 60), jnp.log(mdp.start))
        return jax.lax.scan(step, (start, jnp.ones(())), jnp.arange(60))[1].sum()

    returns = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(1), 20_000))
    close(returns.mean(), expected_return(mdp, policy), atol=4 * returns.std() / 20_000**0.5)


def test_the_policy_gradient_theorem_holds_on_the_exact_return():
    # ∂J/∂θ of softmax logits: Σ_s d(s) π(a|s) (Q(s, a) − V(s)), with d the discounted visits.
    mdp, logits = random_mdp(5), jax.random.normal(jax.random.key(2), (5, 3))
    gradient = jax.grad(lambda logits: expected_return(mdp, jax.nn.softmax(logits)))(logits)
    policy = jax.nn.softmax(logits)
    values = policy_values(mdp, policy)
    alive = 1 - mdp.terminal
    moves = alive[:, None] * jnp.einsum("sa,sat->st", policy, mdp.transition) * alive[None]
    visits = jnp.linalg.solve((jnp.eye(5) - mdp.gamma * moves).T, mdp.start)
    close(gradient, visits[:, None] * policy * (action_values(mdp, values) - values[:, None]), atol=1e-5)


def test_frozen_lake_has_the_known_value_and_its_best_policy_avoids_the_holes():
    best = jax.jit(value_iteration)(frozen_lake())
    close(best.values[0], 0.5420, atol=1e-4)  # the textbook's lake, γ = 0.99
    firm = value_iteration(frozen_lake(is_slippery=False))
    close(firm.values[0], 0.99**5, rtol=1e-6)  # six steps to the goal, the last one paid at once
    with pytest.raises(ValueError, match="rows must have equal lengths"):
        frozen_lake(("SF", "G"))
    with pytest.raises(ValueError, match="got \\('XF', 'FG'\\)"):
        frozen_lake(("XF", "FG"))


def test_q_learning_finds_the_action_values_without_reading_the_transitions():
    mdp = random_mdp(1)
    exact = action_values(mdp, value_iteration(mdp).values)
    learned = jax.jit(q_learning, static_argnames="num_steps")(
        jax.random.key(0), mdp, num_steps=50_000, learning_rate=1.0, epsilon=0.5, decay=0.05
    )
    close(learned, exact, atol=0.2)
    assert (greedy(learned) == greedy(exact))[1:].all()
    lake = frozen_lake(("SFF", "FHF", "FFG"), is_slippery=False)
    q = q_learning(jax.random.key(0), lake, num_steps=5000, learning_rate=0.5, epsilon=0.3)
    close(expected_return(lake, greedy(q)), 0.99**3, rtol=1e-5)
