r"""Markov decision processes small enough for tables: exact values, value and policy iteration, Q-learning.

A policy is an array `[states, actions]` whose rows sum to 1, a state-value function `[states]`, an action-value function
`[states, actions]`. Everything that the other algorithms estimate has an exact answer here.

References:
    Sutton and Barto, 2018, Reinforcement Learning, 2nd edition, chapters 3, 4 and 6.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.types import Key, Numeric


class MDP(NamedTuple):
    """A Markov decision process with finitely many states and actions.

    An episode ends in a terminal state, whose value is 0 and whose own transitions and rewards are not used.

    Attributes:
        transition: Probability of each next state.
        reward: Expected reward of an action in a state.
        terminal: 1 where the episode is over, else 0.
        start: Probability of each first state; 0 for terminal ones.
        gamma: Discount, in [0, 1]; below 1 if an episode may last for ever.
    """

    transition: Float[Array, "states actions states"]
    reward: Float[Array, "states actions"]
    terminal: Float[Array, " states"]
    start: Float[Array, " states"]
    gamma: Numeric


def action_values(mdp: MDP, values: Float[Array, " states"]) -> Float[Array, "states actions"]:
    r"""Computes $Q(s, a) = r(s, a) + \gamma \sum_{s'} P(s' | s, a) V(s')$; 0 in terminal states."""
    q = mdp.reward + mdp.gamma * mdp.transition @ ((1 - mdp.terminal) * values)
    return (1 - mdp.terminal)[:, None] * q


def policy_values(mdp: MDP, policy: Float[Array, "states actions"]) -> Float[Array, " states"]:
    r"""Computes the value of a policy exactly, by solving the Bellman equation $V = r_\pi + \gamma P_\pi V$.

    Args:
        mdp: The process.
        policy: Probabilities of actions in each state.

    Example:
        >>> stay, leave = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])  # state 0 pays 1 for staying, state 1 is the end
        >>> mdp = MDP(jnp.array([[stay, leave], [leave, leave]]), jnp.array([stay, leave * 0]), leave, stay, gamma=0.9)
        >>> round(float(policy_values(mdp, jnp.full((2, 2), 0.5))[0]), 4)  # v = 0.5 (1 + 0.9 v)
        0.9091
    """
    alive = 1 - mdp.terminal
    reward = alive * jnp.sum(policy * mdp.reward, axis=1)
    transition = alive[:, None] * jnp.einsum("sa,sat->st", policy, mdp.transition) * alive[None]
    return jnp.linalg.solve(jnp.eye(len(reward)) - mdp.gamma * transition, reward)


def expected_return(mdp: MDP, policy: Float[Array, "states actions"]) -> Float[Array, ""]:
    r"""Computes $J(\pi) = \sum_s \rho(s) V_\pi(s)$, the mean return of an episode: what policy gradients climb."""
    return jnp.sum(mdp.start * policy_values(mdp, policy))


def greedy(q: Float[Array, "states actions"]) -> Float[Array, "states actions"]:
    """Makes the policy that takes the best action, the first of equals."""
    return jax.nn.one_hot(jnp.argmax(q, axis=1), q.shape[1])


class Iterated(NamedTuple):
    """What an iteration to a fixed point found.

    Attributes:
        values: Of the best policy.
        policy: A best policy.
        iterations: How many were done.
    """

    values: Float[Array, " states"]
    policy: Float[Array, "states actions"]
    iterations: Int[Array, ""]


def value_iteration(mdp: MDP, *, tolerance: float = 1e-6, max_iterations: int = 10_000) -> Iterated:
    r"""Repeats $V(s) \leftarrow \max_a Q(s, a)$ until no value changes by more than `tolerance`.

    Values are then within $\gamma / (1 - \gamma)$ times the tolerance of the best possible.

    Args:
        mdp: The process.
        tolerance: Largest change of a value, in units of reward, at which it ends.
        max_iterations: Bound on the iterations.
    """

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        _, change, count = carry
        return (change > tolerance) & (count < max_iterations)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, _, count = carry
        better = action_values(mdp, values).max(axis=1)
        return better, jnp.max(jnp.abs(better - values)), count + 1

    start = jnp.zeros(mdp.reward.shape[0]), jnp.array(jnp.inf), jnp.array(0)
    values, _, count = jax.lax.while_loop(unfinished, improve, start)
    return Iterated(values, greedy(action_values(mdp, values)), count)


def policy_iteration(mdp: MDP, *, max_iterations: int = 1000) -> Iterated:
    """Evaluates the policy exactly and takes the greedy one of its action values, until nothing changes.

    Args:
        mdp: The process; with gamma = 1, every policy must end.
        max_iterations: Bound on the iterations; few are needed.
    """

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        _, changed, count = carry
        return changed & (count < max_iterations)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        policy, _, count = carry
        q = action_values(mdp, policy_values(mdp, policy))
        # Only by more than rounding: equals would take turns for ever.
        improves = q.max(1) > jnp.sum(policy * q, 1) + 1e-6 * (1 + jnp.abs(q).max(1))
        return jnp.where(improves[:, None], greedy(q), policy), improves.any(), count + 1

    start = greedy(mdp.reward), jnp.array(True), jnp.array(0)
    policy, _, count = jax.lax.while_loop(unfinished, improve, start)
    return Iterated(policy_values(mdp, policy), policy, count)


def q_learning(
    key: Key,
    mdp: MDP,
    *,
    num_steps: int,
    learning_rate: Numeric = 0.1,
    epsilon: Numeric = 0.1,
    decay: Numeric = 0.0,
) -> Float[Array, "states actions"]:
    r"""Learns action values from steps alone, without reading the transitions (off-policy temporal difference).

    $$ Q(s, a) \leftarrow Q(s, a) + \alpha\, (r + \gamma \max_{a'} Q(s', a') - Q(s, a)) $$

    Args:
        key: Consumed.
        mdp: The process; it is only sampled. Rewards are those expected of (state, action).
        num_steps: Steps to take. A new episode starts where one ends.
        learning_rate: α of the first visit of a pair, in (0, 1].
        epsilon: Share of random actions, in [0, 1]; the others are the best known.
        decay: α of visit n is `learning_rate / (1 + decay * n)`. Above 0, values converge and do not jitter for ever.

    References:
        Watkins and Dayan, 1992; Sutton and Barto, section 6.5.
    """
    start_key, steps_key = jax.random.split(key)
    first = jax.random.categorical(start_key, jnp.log(mdp.start))

    def step(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], None]:
        q, visits, state = carry
        keys = jax.random.split(jax.random.fold_in(steps_key, number), 5)
        random = jax.random.randint(keys[0], (), 0, q.shape[1])
        best = q[state] == q[state].max()  # Among equals by chance: the first alone would be tried for ever.
        known = jax.random.categorical(keys[1], jnp.where(best, 0.0, -jnp.inf))
        action = jnp.where(jax.random.uniform(keys[2]) < epsilon, random, known)
        next_state = jax.random.categorical(keys[3], jnp.log(mdp.transition[state, action]))
        ended = mdp.terminal[next_state]
        target = mdp.reward[state, action] + mdp.gamma * (1 - ended) * q[next_state].max()
        rate = learning_rate / (1 + decay * visits[state, action])
        q = q.at[state, action].add(rate * (target - q[state, action]))
        restart = jax.random.categorical(keys[4], jnp.log(mdp.start))
        return (q, visits.at[state, action].add(1), jnp.where(ended == 1, restart, next_state)), None

    zeros = jnp.zeros(mdp.reward.shape)
    return jax.lax.scan(step, (zeros, zeros, first), jnp.arange(num_steps))[0][0]


FROZEN_LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")
"""The 4 × 4 lake of OpenAI Gym: start, frozen, hole, goal."""


def frozen_lake(rows: Sequence[str] = FROZEN_LAKE, *, is_slippery: bool = True, gamma: float = 0.99) -> MDP:
    """Makes the MDP of a frozen lake: walk from S to G (reward 1) without falling into a hole H.

    Actions are left, down, right and up. On slippery ice the walker goes where it wants in one of three cases, else to one of
    the two sides.

    Args:
        rows: The lake, one letter a field; its states are numbered row by row.
        is_slippery: Whether the ice is.
        gamma: Discount.

    Raises:
        ValueError: If the rows are no lake.

    Example:
        >>> round(float(value_iteration(frozen_lake()).values[0]), 3)
        0.542
    """
    equal = len(set(map(len, rows))) == 1
    fields = np.array([list(row) for row in rows]) if equal else np.array([])
    if not set(fields.ravel()) <= set("SFHG") or "S" not in fields:
        raise ValueError(f"rows must have equal lengths, letters of S, F, H, G and an S, got {rows!r}.")
    height, width = fields.shape
    letters, states = fields.ravel(), np.arange(fields.size)
    moves = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])
    places = np.stack(np.divmod(states, width), axis=1)[:, None] + moves
    places = places.clip(0, [height - 1, width - 1])
    reached = np.eye(fields.size)[places[..., 0] * width + places[..., 1]]
    transition = (sum(np.roll(reached, shift, axis=1) for shift in (-1, 0, 1)) / 3) if is_slippery else reached
    return MDP(
        transition=jnp.asarray(transition, jnp.float32),
        reward=jnp.asarray(transition @ (letters == "G"), jnp.float32),
        terminal=jnp.asarray(np.isin(letters, ["H", "G"]), jnp.float32),
        start=jnp.asarray((letters == "S") / (letters == "S").sum(), jnp.float32),
        gamma=gamma,
    )
