import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollouts.environment import Transition
from jaxrl_llm.rollouts.replay import add, init_buffer, n_step_experience, sample

close = np.testing.assert_allclose


def steps(rewards, terminated=(), truncated=()):
    """One environment, whose observation at time t is t, and at the end of an episode 100 + t."""
    time = len(rewards)
    ended = np.isin(np.arange(time), [*terminated, *truncated])
    column = lambda x, dtype=jnp.float32: jnp.asarray(x, dtype)[:, None]  # noqa: E731
    return Transition(
        observation=column(np.arange(time))[..., None],
        action=column(np.arange(time), jnp.int32),
        log_prob=column(np.zeros(time)),
        reward=column(rewards),
        terminated=column(np.isin(np.arange(time), terminated), bool),
        truncated=column(np.isin(np.arange(time), truncated), bool),
        final_observation=column(np.where(ended, 100 + np.arange(time), np.arange(time) + 1))[..., None],
        episode_return=column(rewards),
        episode_length=column(np.arange(time), jnp.int32),
    )


def test_a_step_terminates_or_goes_on_from_where_it_led():
    rows = n_step_experience(steps([1.0, 2.0, 3.0, 4.0], terminated=[1], truncated=[2]), gamma=0.9)
    close(rows.reward, [1, 2, 3, 4])
    close(rows.discount, [0.9, 0, 0.9, 0.9])  # only what TERMINATED has no future
    close(rows.next_observation[:, 0], [1, 101, 102, 4])
    close(rows.observation[:, 0], [0, 1, 2, 3])


def test_n_steps_end_with_the_episode_or_the_rollout():
    rows = n_step_experience(steps([1.0, 2.0, 3.0, 4.0, 5.0], truncated=[2]), gamma=0.5, n=3)
    close(rows.reward, [1 + 1 + 0.75, 2 + 1.5, 3, 4 + 2.5, 5])
    close(rows.discount, [0.125, 0.25, 0.5, 0.25, 0.5])
    close(rows.next_observation[:, 0], [102, 102, 102, 5, 5])
    rows = n_step_experience(steps([1.0, 2.0, 3.0], terminated=[1]), gamma=0.5, n=3)
    close(rows.reward, [2, 2, 3])
    close(rows.discount, [0, 0, 0.5])


def test_a_terminal_step_at_the_time_limit_has_no_future():
    rows = n_step_experience(steps([1.0], terminated=[0], truncated=[0]), gamma=0.9)
    close(rows.discount, [0])


def test_the_oldest_rows_make_room_for_new_ones():
    buffer = init_buffer({"x": jnp.zeros((2, 3))}, 5)
    assert buffer.rows["x"].shape == (5, 3)
    for start in (0, 2, 4):
        buffer = jax.jit(add)(buffer, {"x": jnp.arange(start, start + 2.0)[:, None] * jnp.ones((1, 3))})
    np.testing.assert_array_equal(buffer.rows["x"][:, 0], [5, 1, 2, 3, 4])
    assert (buffer.size, buffer.position) == (5, 1)
    with pytest.raises(ValueError, match="at most as many as the buffer holds, 5, got 6"):
        add(buffer, {"x": jnp.zeros((6, 3))})


def test_samples_are_drawn_evenly_from_what_is_there():
    buffer = add(init_buffer(jnp.zeros(1), 8), jnp.arange(3.0))
    drawn = sample(buffer, jax.random.key(0), 30_000)
    counts = np.bincount(np.asarray(drawn, int), minlength=8)
    assert (counts[3:] == 0).all()
    close(counts[:3], 10_000, rtol=0.05)
