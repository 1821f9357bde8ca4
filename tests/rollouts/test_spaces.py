import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from jaxrl_llm.rollouts.registry import make_environment
from jaxrl_llm.rollouts.spaces import actions_of, clip_action, observation_encoder


class Shows:
    """Stands for an environment with these spaces."""

    name = "probe"

    def __init__(self, observation=None, action=None):
        self.observation_space = lambda params: observation
        self.action_space = lambda params: action


def test_arrays_are_flattened_and_whole_numbers_read_as_floats():
    encode, size = observation_encoder(*make_environment("Breakout-MinAtar"))
    board = jax.random.bernoulli(jax.random.key(0), shape=(2, 3, 10, 10, 4)).astype(jnp.int32)
    assert size == 400
    np.testing.assert_array_equal(encode(board), board.reshape(2, 3, 400))
    assert encode(board).dtype == jnp.float32
    assert encode(board[0, 0]).shape == (400,)


def test_categories_are_one_hot():
    encode, size = observation_encoder(*make_environment("FrozenLake-misc"))
    assert size == 16
    np.testing.assert_array_equal(encode(jnp.array([[3], [15]])), np.eye(16)[[[3], [15]]])


def test_trees_are_joined_leaf_by_leaf():
    box, three = spaces.Box(0, 1, (2, 2)), spaces.Discrete(3)
    encode, size = observation_encoder(Shows(spaces.Dict({"a": box, "b": three})), None)
    joined = encode({"a": jnp.arange(8.0).reshape(2, 2, 2), "b": jnp.array([0, 2])})
    assert size == 7
    np.testing.assert_array_equal(joined, [[0, 1, 2, 3, 1, 0, 0], [4, 5, 6, 7, 0, 0, 1]])
    struct = collections.namedtuple("struct", "a b")(jnp.ones((1, 2, 2)), jnp.array([2]))
    np.testing.assert_array_equal(encode(struct), [[1, 1, 1, 1, 0, 0, 1]])
    encode, size = observation_encoder(Shows(spaces.Tuple((three, box))), None)
    np.testing.assert_array_equal(encode((jnp.array([1]), jnp.ones((1, 2, 2)))), [[0, 1, 0, 1, 1, 1, 1]])


def test_other_spaces_are_refused():
    with pytest.raises(ValueError, match=r"env must observe arrays .* got probe with None"):
        observation_encoder(Shows(), None)
    for space in (None, spaces.Box(0, 1, (2, 2))):
        with pytest.raises(ValueError, match=r"env must take one of n actions .* got probe with"):
            actions_of(Shows(action=space), None)


def test_actions_tell_their_kind_and_are_brought_into_range():
    assert actions_of(*make_environment("CartPole-v1")) == (2, False)
    assert actions_of(*make_environment("Reacher-misc")) == (2, True)
    env, env_params = make_environment("PointRobot-misc")  # bounds of ±0.1 for each of two numbers
    moved = clip_action(env, env_params, jnp.array([[[5.0, -5.0], [0.05, 0.0]]]))
    np.testing.assert_allclose(moved, [[[0.1, -0.1], [0.05, 0.0]]], rtol=1e-6)
    actions = jnp.array([0, 7])
    assert clip_action(*make_environment("CartPole-v1"), actions) is actions
