import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import environment, spaces

from jaxrl_llm.rollouts.environment import (
    episode_metrics,
    evaluate,
    greedy_policy,
    mean_over_episodes,
    play_episodes,
    reset,
    rollout,
    stochastic_policy,
)
from jaxrl_llm.rollouts.registry import make_environment
from jaxrl_llm.rollouts.spaces import observation_encoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENV, ENV_PARAMS = make_environment("CartPole-v1")
START_BOUND = 0.05  # CartPole starts within ±0.05 in every coordinate.


def balance(params, observation, key):
    """A controller that keeps the pole up for ever."""
    del params, key
    x, x_dot, angle, angle_dot = jnp.moveaxis(observation, -1, 0)
    action = (angle + 0.5 * angle_dot + 0.01 * x + 0.05 * x_dot > 0).astype(jnp.int32)
    return action, jnp.zeros(action.shape)


def push_left(params, observation, key):
    """Lets the pole fall within ten steps or so."""
    del params, key
    return jnp.zeros(observation.shape[0], jnp.int32), jnp.zeros(observation.shape[0])


def coin(params, observation, key):
    del params
    action = jax.random.bernoulli(key, shape=observation.shape[:1]).astype(jnp.int32)
    return action, jnp.full(action.shape, -jnp.log(2.0))


def play(policy, num_envs, num_steps, *, seed=0, env=ENV, env_params=ENV_PARAMS):
    """Rolls out from fresh starts, as numpy."""

    @jax.jit
    def compiled(key):
        reset_key, rollout_key = jax.random.split(key)
        start = reset(reset_key, env, env_params, num_envs)
        return start, *rollout(policy, None, rollout_key, env, env_params, start, num_steps)

    return jax.device_get(compiled(jax.random.key(seed)))


@pytest.fixture(scope="module")
def balanced():
    return play(balance, num_envs=2, num_steps=502)


@pytest.fixture(scope="module")
def tossed():
    return play(coin, num_envs=3, num_steps=200)


def test_the_time_limit_truncates_the_500th_step_and_does_not_terminate_it(balanced):
    _, _, transitions = balanced
    assert not transitions.terminated.any()
    assert np.flatnonzero(transitions.truncated.any(1)).tolist() == [499]
    np.testing.assert_array_equal(transitions.reward, 1)
    np.testing.assert_array_equal(transitions.episode_return[499], 500)
    np.testing.assert_array_equal(transitions.episode_length[499:, 0], [500, 1, 2])


def test_at_the_time_limit_the_final_observation_is_where_the_episode_was_and_the_next_one_is_a_fresh_start(balanced):
    _, _, transitions = balanced
    assert np.abs(transitions.observation[500]).max() <= START_BOUND
    assert np.abs(transitions.final_observation[499]).max() > START_BOUND
    # One step of 0.02 s moves the cart by 0.02 times its speed: the final observation follows from the last one.
    last = transitions.observation[499]
    np.testing.assert_allclose(transitions.final_observation[499][:, 0], last[:, 0] + 0.02 * last[:, 1], rtol=1e-6)


def test_a_fall_terminates_and_its_final_observation_is_out_of_bounds(tossed):
    _, _, transitions = tossed
    assert transitions.terminated.any(0).all()
    assert not transitions.truncated.any()
    fallen = transitions.final_observation[transitions.terminated]
    assert ((np.abs(fallen[:, 2]) > 12 * 2 * np.pi / 360) | (np.abs(fallen[:, 0]) > 2.4)).all()


def test_inside_an_episode_the_final_observation_is_the_next_observation(tossed):
    _, end, transitions = tossed
    following = np.concatenate([transitions.observation[1:], end.observation[None]])
    inside = ~transitions.terminated
    # One value, which the compiler may compute in two places with different rounding.
    np.testing.assert_allclose(transitions.final_observation[inside], following[inside], rtol=1e-6)
    assert np.abs(following[~inside]).max() <= START_BOUND


def test_episode_returns_and_lengths_count_from_reset_to_end(tossed):
    _, end, transitions = tossed
    running = np.zeros(3)
    for t in range(200):
        running += transitions.reward[t]
        np.testing.assert_array_equal(transitions.episode_return[t], running)
        np.testing.assert_array_equal(transitions.episode_length[t], running)
        running *= ~transitions.terminated[t]
    np.testing.assert_array_equal(end.episode_return, running)
    np.testing.assert_array_equal(end.episode_length, running)


def test_a_rollout_goes_on_where_the_last_one_ended():
    key = jax.random.key(3)
    start = reset(jax.random.key(4), ENV, ENV_PARAMS, 2)
    middle, _ = rollout(push_left, None, key, ENV, ENV_PARAMS, start, 5)
    end, second = rollout(push_left, None, jax.random.key(5), ENV, ENV_PARAMS, middle, 5)
    np.testing.assert_array_equal(second.observation[0], middle.observation)
    np.testing.assert_array_equal(second.episode_length[0], middle.episode_length + 1)
    assert np.asarray(second.terminated).any()
    assert np.asarray(end.episode_length).max() < 10


def test_the_same_key_gives_the_same_rollout_and_another_key_another(tossed):
    again = play(coin, num_envs=3, num_steps=200)
    chex.assert_trees_all_equal(tossed, again)
    other = play(coin, num_envs=3, num_steps=200, seed=1)
    assert (other[2].action != tossed[2].action).any()


def test_environments_start_and_act_independently_of_each_other(tossed):
    start, _, transitions = tossed
    assert len(np.unique(start.observation[:, 0])) == 3
    assert len(np.unique(transitions.action, axis=1).T) == 3


def test_vmapped_rollouts_equal_a_loop():
    def one(key):
        reset_key, rollout_key = jax.random.split(key)
        start = reset(reset_key, ENV, ENV_PARAMS, 2)
        return rollout(coin, None, rollout_key, ENV, ENV_PARAMS, start, 20)

    looped = [jax.jit(one)(jax.random.key(seed)) for seed in range(3)]
    vmapped = jax.jit(jax.vmap(one))(jax.vmap(jax.random.key)(jnp.arange(3)))
    looped = jax.tree.map(lambda *parts: jnp.stack(parts), *looped)
    chex.assert_trees_all_equal(looped[1].action, vmapped[1].action)
    chex.assert_trees_all_close(looped, vmapped, rtol=1e-6)


def test_no_part_of_the_state_is_weakly_typed_so_that_a_restored_state_compiles_nothing_anew():
    compiled = jax.jit(lambda start, key: rollout(coin, None, key, ENV, ENV_PARAMS, start, 2)[0])
    end = compiled(reset(jax.random.key(0), ENV, ENV_PARAMS, 2), jax.random.key(1))
    end = compiled(end, jax.random.key(2))
    restored = jax.tree.map(lambda x: jnp.array(np.asarray(x)), end)
    compiled(restored, jax.random.key(3))
    assert compiled._cache_size() == 1


def test_episode_metrics_are_means_over_the_episodes_that_ended(tossed):
    _, _, transitions = tossed
    returns = transitions.episode_return[transitions.terminated]
    metrics = episode_metrics(jax.tree.map(jnp.asarray, transitions))
    assert metrics["episode/count"] == len(returns)
    np.testing.assert_allclose(metrics["episode/return_mean"], returns.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["episode/length_mean"], returns.mean(), rtol=1e-6)


def test_means_are_nan_where_no_episode_ended_and_such_parts_do_not_count_in_the_total(balanced):
    _, _, transitions = balanced
    first = episode_metrics(jax.tree.map(lambda x: jnp.asarray(x[:100]), transitions))
    assert first["episode/count"] == 0
    assert np.isnan(first["episode/return_mean"])
    means, counts = jnp.array([[10.0, jnp.nan, 40.0], [jnp.nan, jnp.nan, jnp.nan]]), jnp.array([[2, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(mean_over_episodes(means, counts), [20.0, np.nan])


def test_evaluation_plays_exactly_one_episode_in_each_environment():
    returns, lengths = evaluate(push_left, None, jax.random.key(0), ENV, ENV_PARAMS, 8)
    np.testing.assert_array_equal(returns, lengths)
    assert 8 <= np.asarray(lengths).min() <= np.asarray(lengths).max() <= 11


def test_evaluation_sees_the_time_limit():
    returns, lengths = evaluate(balance, None, jax.random.key(0), ENV, ENV_PARAMS.replace(max_steps_in_episode=30), 4)
    np.testing.assert_array_equal(returns, 30)
    np.testing.assert_array_equal(lengths, 30)


class Falling(environment.Environment):
    """Terminates at its second step, which can be the time limit too. Observes the time."""

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return self.observe(key, state, action, params), state, jnp.float32(1), state.time >= 2, {}

    def action_space(self, params):
        return spaces.Discrete(2)

    def reset_env(self, key, params):
        state = environment.EnvState(time=jnp.int32(0))
        return self.observe(key, state, None, params), state

    def observe(self, key, state, action, params):
        return jnp.full(1, state.time, jnp.float32)


def test_a_step_can_terminate_and_truncate_at_once_and_both_are_told():
    env_params = environment.EnvParams(max_steps_in_episode=2)
    _, _, transitions = play(push_left, num_envs=1, num_steps=4, env=Falling(), env_params=env_params)
    for flag in (transitions.terminated, transitions.truncated):
        np.testing.assert_array_equal(flag[:, 0], [False, True, False, True])
    np.testing.assert_array_equal(transitions.final_observation[:, 0, 0], [1, 2, 1, 2])
    np.testing.assert_array_equal(transitions.observation[:, 0, 0], [0, 1, 0, 1])


LOGITS = jnp.log(jnp.array([0.2, 0.5, 0.3]))


def three_actions(params, observation):
    return params + jnp.broadcast_to(LOGITS, (observation.shape[0], 3)), None


def test_the_stochastic_policy_samples_the_distribution_of_its_logits_and_tells_the_log_probability():
    action, log_prob = stochastic_policy(three_actions)(1.0, jnp.zeros((20_000, 4)), jax.random.key(0))
    frequencies = np.bincount(np.asarray(action)) / 20_000
    np.testing.assert_allclose(frequencies, [0.2, 0.5, 0.3], atol=4 * np.sqrt(0.25 / 20_000))
    np.testing.assert_allclose(log_prob, LOGITS[action], rtol=1e-5)


def test_the_greedy_policy_takes_the_most_likely_action():
    action, log_prob = greedy_policy(three_actions)(1.0, jnp.zeros((5, 4)), jax.random.key(0))
    np.testing.assert_array_equal(action, 1)
    np.testing.assert_array_equal(log_prob, 0)


def test_the_same_name_gives_the_same_environment_so_that_nothing_is_compiled_twice():
    assert make_environment("CartPole-v1")[0] is ENV


def test_a_wrong_name_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"env must be .*'CartPole-v0'\. Did you mean CartPole-v1"):
        make_environment("CartPole-v0")


def test_a_name_like_no_other_is_refused_with_the_list_of_all():
    with pytest.raises(ValueError, match=r"got 'zzz'\. All names: CartPole-v1, Pendulum-v1"):
        make_environment("zzz")


def test_parameters_of_an_environment_are_changed_by_name():
    assert make_environment("CartPole-v1", ("max_steps_in_episode=7", "gravity=1"))[1].max_steps_in_episode == 7
    assert make_environment("CartPole-v1", ("gravity=1",))[1].gravity == 1.0
    with pytest.raises(
        ValueError, match=r"env_params must be parameters of CartPole-v1, got 'gravty=1'.*Did you mean grav"
    ):
        make_environment("CartPole-v1", ("gravty=1",))
    for wrong in ("gravity", "gravity=strong", "max_steps_in_episode=7.5"):
        with pytest.raises(ValueError, match=f"env_params must be name=value with a value like .*got '{wrong}'"):
            make_environment("CartPole-v1", (wrong,))


def test_an_environment_of_the_user_is_found_by_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom flax import struct\n"
        "from gymnax.environments.classic_control.cartpole import CartPole as Mine\n"
        "@struct.dataclass\nclass State:\n    x: float = 0.0\n"
    )
    env, env_params = make_environment(f"{file}:Mine", ("max_steps_in_episode=3",))
    assert (env.name, env_params.max_steps_in_episode) == ("CartPole-v1", 3)
    assert make_environment("gymnax.environments.classic_control.cartpole:CartPole")[0].name == "CartPole-v1"
    places = [(f"{file}:Other", "Other"), ("nowhere:X", "nowhere"), (f"{tmp_path}/no.py:X", "no.py")]
    for place, message in [*places, (":Mine", "Empty module name"), ("..mine:Mine", "relative import")]:
        with pytest.raises(ValueError, match=f"env must be a gymnax environment or module:Name, got .*{message}"):
            make_environment(place)
    with pytest.raises(ValueError, match=r"env must be a class or function without arguments.*'json:dumps'"):
        make_environment("json:dumps")
    with pytest.raises(ValueError, match=r"env must make a gymnax environment, got 'builtins:dict', which makes dict"):
        make_environment("builtins:dict")


def test_an_environment_that_cannot_download_its_data_says_so(monkeypatch):
    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(gymnax, "make", offline)
    with pytest.raises(ValueError, match="env must be an environment that can be made here, got 'MNISTBandit-bsuite'"):
        make_environment("MNISTBandit-bsuite")


def test_continuous_actions_are_clipped_on_the_way_in_and_kept_as_drawn():
    env, env_params = make_environment("Pendulum-v1")

    def too_strong(params, observation, key):
        del params, key
        return jnp.full((observation.shape[0], 1), 50.0), jnp.zeros(observation.shape[0])

    def strongest(params, observation, key):
        del params, key
        return jnp.full((observation.shape[0], 1), 2.0), jnp.zeros(observation.shape[0])

    _, _, clipped = play(too_strong, num_envs=2, num_steps=5, env=env, env_params=env_params)
    _, _, expected = play(strongest, num_envs=2, num_steps=5, env=env, env_params=env_params)
    np.testing.assert_array_equal(clipped.action, 50)
    np.testing.assert_array_equal(clipped.reward, expected.reward)
    np.testing.assert_array_equal(clipped.observation, expected.observation)


def test_whole_episodes_are_masked_after_their_end():
    start = reset(jax.random.key(0), ENV, ENV_PARAMS, 3)
    together = jax.tree.map(lambda x: jnp.repeat(x[:1], 3, axis=0), start)
    steps, mask = jax.jit(lambda start: play_episodes(push_left, None, jax.random.key(1), ENV, ENV_PARAMS, start))(
        together
    )
    lengths = mask.sum(0)
    assert (lengths > 5).all()
    assert (lengths < 20).all()
    for env in range(3):
        length = lengths[env]
        assert mask[:length, env].all()
        assert steps.terminated[length - 1, env]
        assert not steps.terminated[: length - 1, env].any()
    # The same start and the same actions: the same episode.
    np.testing.assert_array_equal(steps.observation[: lengths[0], 0], steps.observation[: lengths[0], 1])


def test_environments_that_were_registered_by_the_user_are_found():
    class Registered(Falling):
        def observation_space(self, params):
            return spaces.Box(0, 2, (1,))

        @property
        def default_params(self):
            return environment.EnvParams(max_steps_in_episode=2)

    gymnax.register("Registered-test", Registered)
    assert observation_encoder(*make_environment("Registered-test"))[1] == 1
