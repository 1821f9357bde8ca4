import dataclasses
import functools
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from jaxrl_llm.recipes.control import algorithm, on_policy, ppo
from jaxrl_llm.recipes.control.on_policy import make_batch
from jaxrl_llm.recipes.control.options import Agent
from jaxrl_llm.recipes.control.ppo import Config, init, learn, train, update
from jaxrl_llm.rollouts.environment import Transition, mean_over_episodes
from jaxrl_llm.rollouts.registry import make_environment
from jaxrl_llm.training import checkpoints
from jaxrl_llm.training.logging import read_metrics
from tests.recipes import probes  # noqa: F401

TINY = Config(
    total_timesteps=100,  # three updates and four steps that fill none
    num_envs=2,
    num_steps=16,
    update_epochs=2,
    num_minibatches=2,
    hidden_sizes=(8,),
    learning_rate=1e-3,
    updates_per_step=2,
    save_steps=1,
    save_total_limit=9,
    eval_episodes=2,
)
jit_train = jax.jit(train, static_argnums=1)


def key_of(seed):
    return jax.random.key(seed)


def final_training_return(metrics):
    """Mean return of the episodes that ended in the last tenth of the updates, for each seed."""
    last = slice(-(metrics["episode/count"].shape[-1] // 10), None)
    return mean_over_episodes(metrics["episode/return_mean"][..., last], metrics["episode/count"][..., last])


@pytest.fixture(scope="module")
def tiny():
    return jit_train(key_of(0), TINY)


def trained_on_probe(env, **settings):
    config = dataclasses.replace(
        TINY, env=env, total_timesteps=6400, num_envs=4, num_steps=16, learning_rate=1e-2, vf_clip_eps=None, **settings
    )
    state, _ = jit_train(key_of(0), config)
    return functools.partial(config.apply(), Agent(state.train.params))


def test_the_value_of_a_reward_that_only_a_time_limit_interrupts_is_that_of_the_endless_sum():
    # 1 / (1 - γ) = 10. Without bootstrapping through the limit of 8 steps it could be at most 5.7.
    _, value = trained_on_probe("Clock-probe", gamma=0.9)(jnp.ones((1, 1)))
    np.testing.assert_allclose(value, 10, rtol=0.05)


def test_advantages_bootstrap_from_the_final_observation_at_a_truncation_and_from_nothing_at_a_termination(tiny):
    rng = np.random.default_rng(0)
    params = tiny[0].train.params
    shape = time, envs = 6, 2
    terminated, truncated = rng.random(shape) < 0.3, rng.random(shape) < 0.3
    transitions = Transition(
        observation=jnp.asarray(rng.normal(size=(*shape, 4)), jnp.float32),
        action=jnp.zeros(shape, jnp.int32),
        log_prob=jnp.zeros(shape),
        reward=jnp.asarray(rng.normal(size=shape), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        final_observation=jnp.asarray(rng.normal(size=(*shape, 4)), jnp.float32),
        episode_return=jnp.zeros(shape),
        episode_length=jnp.zeros(shape, jnp.int32),
    )
    assert (terminated & truncated).any()
    assert (truncated & ~terminated).any()
    batch = jax.jit(make_batch, static_argnums=3)(Agent(params), transitions, transitions.reward, TINY)

    values, next_values = (
        np.asarray(TINY.apply()(Agent(params), x)[1]) for x in (transitions.observation, transitions.final_observation)
    )
    expected, advantage = np.zeros(shape), np.zeros(envs)
    for t in reversed(range(time)):
        future = np.where(terminated[t], 0, next_values[t])
        advantage = np.where(terminated[t] | truncated[t], 0, 0.99 * 0.95 * advantage)
        advantage += np.asarray(transitions.reward[t]) + 0.99 * future - values[t]
        expected[t] = advantage
    np.testing.assert_allclose(batch.advantage, expected.reshape(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.returns, (expected + values).reshape(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(batch.value, values.reshape(-1), rtol=1e-6)
    np.testing.assert_array_equal(batch.features, transitions.observation.reshape(-1, 4))


def test_ppo_learns_to_balance_the_pole():
    config = Config(total_timesteps=40_000, learning_rate=1e-3)
    _, metrics = jit_train(key_of(0), config)
    start = mean_over_episodes(metrics["episode/return_mean"][:5], metrics["episode/count"][:5])
    assert start < 40
    assert final_training_return(metrics) > 120


@pytest.mark.slow
def test_cartpole_is_solved_in_500k_steps():
    # `python -m benchmarks.control ppo_cartpole_default`: 10 in 10 runs reach 500. But each is chaotic (another compiler,
    # another run), so the bar is on many.
    _, metrics = jax.jit(jax.vmap(train, in_axes=(0, None)), static_argnums=1)(
        jax.vmap(jax.random.key)(jnp.arange(8)), Config()
    )
    returns = np.asarray(final_training_return(metrics))
    assert np.median(returns) == 500
    assert returns.mean() > 495


def test_vmapped_seeds_and_learning_rates_equal_separate_runs(tiny):
    def train_at(key, learning_rate):
        return train(key, dataclasses.replace(TINY, learning_rate=learning_rate))

    keys = jax.vmap(jax.random.key)(jnp.array([0, 1, 0]))
    vmapped = jax.jit(jax.vmap(train_at))(keys, jnp.array([1e-3, 1e-3, 1e-2]))
    lanes = [jax.tree.map(lambda x, lane=lane: x[lane], vmapped) for lane in range(3)]
    chex.assert_trees_all_close(lanes[0], tiny, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(lanes[1], jit_train(key_of(1), TINY), rtol=1e-4, atol=1e-6)
    moved = [lane[0].train.params["policy"]["output"]["kernel"] for lane in lanes]
    assert np.abs(moved[2] - moved[0]).max() > 1e-3


def test_settings_are_a_tree_of_hyperparameters_that_compile_once_and_are_mapped_over(tiny):
    compiled = jax.jit(lambda key, config: train(key, config))  # jax shares the cache of one function
    chex.assert_trees_all_close(compiled(key_of(0), TINY), tiny, rtol=1e-4, atol=1e-6)
    other = compiled(key_of(0), dataclasses.replace(TINY, learning_rate=1e-2))
    assert compiled._cache_size() == 1
    assert np.abs(jax.tree.leaves(other[0].train.params)[0] - jax.tree.leaves(tiny[0].train.params)[0]).max() > 1e-3
    assert jax.tree.map(lambda x: x, TINY) == TINY
    assert jax.tree.leaves(dataclasses.replace(TINY, learning_rate=7e-4, vf_learning_rate=None))[0] == 7e-4
    mapped = jax.vmap(train, in_axes=(0, None))
    assert jax.eval_shape(mapped, jax.vmap(key_of)(jnp.arange(2)), TINY)[1]["loss"].shape == (2, 3)


def test_a_compiled_update_equals_the_eager_one(tiny):
    init_key, update_key, _ = algorithm.split_run_key(key_of(0))
    state = jax.jit(init, static_argnums=1)(init_key, TINY)
    _, eager = update(state, TINY, jax.random.fold_in(update_key, 0))
    # Means over four steps of the optimizer: all but the first depend on the parameters after the step before.
    chex.assert_trees_all_close(eager, {name: curve[0] for name, curve in tiny[1].items()}, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_falls_linearly_from_update_to_update(tiny):
    _, metrics = tiny
    np.testing.assert_allclose(metrics["optimizer/learning_rate"], [1e-3, 2 / 3e3, 1 / 3e3], rtol=1e-6)


def test_a_small_target_kl_ends_the_update_after_one_epoch_and_a_large_one_never(tiny):
    state = tiny[0]
    batch = on_policy.Batch(
        features=jax.random.normal(key_of(2), (32, 4)),
        action=jnp.arange(32) % 2,
        log_prob=jnp.full(32, -jnp.log(2.0)),
        value=jnp.zeros(32),
        advantage=jnp.arange(32.0) % 2,
        returns=jnp.ones(32),
    )

    @jax.jit
    def learned(target_kl):
        config = dataclasses.replace(TINY, target_kl=target_kl)
        return learn(state.train, batch, dataclasses.replace(config, learning_rate=0.01), key_of(1))

    stopped, stopped_metrics = learned(1e-9)
    complete, complete_metrics = learned(1e9)
    assert (stopped_metrics["optimizer/epochs"], complete_metrics["optimizer/epochs"]) == (1, 2)
    assert stopped.step - state.train.step == TINY.num_minibatches
    assert complete.step - state.train.step == 2 * TINY.num_minibatches
    # The epoch that was skipped is not in the metrics either.
    assert stopped_metrics["policy/approxkl_avg"] < complete_metrics["policy/approxkl_avg"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of two seeds in two steps, of two updates and the one that is left, with a checkpoint after each."""
    config = dataclasses.replace(TINY, num_seeds=2, output_dir=str(tmp_path_factory.mktemp("ppo") / "run"))
    return config, ppo.run(config)


def states_of(config):
    """The last checkpoint: the state of each seed."""
    like = jax.eval_shape(jax.vmap(functools.partial(init, config=config)), jax.vmap(jax.random.key)(jnp.arange(2)))
    states = checkpoints.restore(f"{config.output_dir}/checkpoints", like).state
    return [jax.tree.map(lambda x, seed=seed: x[seed], states) for seed in range(2)]


def test_a_run_of_two_seeds_in_steps_equals_train_on_each(finished, tiny):
    config, figures = finished
    separate = [tiny, jit_train(key_of(1), TINY)]
    chex.assert_trees_all_close(states_of(config), [state for state, _ in separate], rtol=1e-4, atol=1e-6)
    lines = read_metrics(config.output_dir)
    assert [(line["step"], line.get("timesteps")) for line in lines] == [(0, None), (1, 64), (2, 96)]
    losses = np.mean([metrics["loss"] for _, metrics in separate], axis=0)
    np.testing.assert_allclose([line["loss"] for line in lines[1:]], [losses[:2].mean(), losses[2]], rtol=1e-3)
    for seed, (_, metrics) in enumerate(separate):
        first = mean_over_episodes(metrics["episode/return_mean"][:2], metrics["episode/count"][:2])
        np.testing.assert_allclose(lines[1][f"seed_{seed}/episode/return_mean"], first, rtol=1e-5)
    assert figures["timesteps"] == 96
    assert set(figures["runs"]) == {"seed_0", "seed_1"}
    assert math.isfinite(figures["train/return"])
    with open(figures["learning_curve"], "rb") as image:
        assert image.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_run_killed_in_its_last_step_resumes_bit_for_bit(finished, tmp_path):
    config, figures = finished
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "run"), resume=True)
    shutil.copytree(config.output_dir, resumed.output_dir)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    again = ppo.run(resumed)
    chex.assert_trees_all_equal(states_of(config), states_of(resumed))
    without_time = [
        [{name: str(x) for name, x in line.items() if name != "time"} for line in read_metrics(c.output_dir)]
        for c in (config, resumed)
    ]
    assert without_time[0] == without_time[1]
    del figures["learning_curve"], again["learning_curve"]
    assert str(again) == str(figures)  # which may hold NaN


def test_resuming_with_steps_of_another_size_is_refused(finished, tmp_path):
    config, _ = finished
    other = dataclasses.replace(config, output_dir=str(tmp_path / "run"), resume=True, updates_per_step=1)
    shutil.copytree(config.output_dir, other.output_dir)
    with pytest.raises(
        ValueError, match=r"updates_per_step=1 does not go on from the checkpoint, which holds 3 updates"
    ):
        ppo.run(other)


def test_a_run_tells_how_many_steps_it_really_takes():
    plan = TINY.plan()["environment steps"]
    assert plan == "96 = 3 updates × 2 environments × 16 steps (4 of total_timesteps fill no update)"
    divisible = dataclasses.replace(TINY, total_timesteps=96).plan()["environment steps"]
    assert "fill no update" not in divisible


def test_updates_are_joined_by_how_many_episodes_ended():
    columns = {
        "episode/count": [1, 0, 3],
        "episode/return_mean": [10.0, math.nan, 30.0],
        "episode/length_mean": [1.0, math.nan, 5.0],
        "loss": [1.0, 2.0, 6.0],
    }
    updates = [{name: jnp.array(column[i]) for name, column in columns.items()} for i in range(3)]
    totals = jax.tree.map(lambda *parts: sum(parts), *map(algorithm.to_totals, updates))
    expected = {"episode/count": 4, "episode/return_mean": 25, "episode/length_mean": 4, "loss": 3}
    assert {name: float(x) for name, x in algorithm.to_means(totals, 3).items()} == expected
    none = algorithm.to_means(algorithm.to_totals(updates[1]), 1)
    assert (none["episode/count"], none["loss"]) == (0, 2)
    assert math.isnan(none["episode/return_mean"])


def test_the_command_line_reads_every_kind_of_option():
    text = (
        "--learning-rate 0.001 --vf-clip-eps None --target-kl 0.02 --hidden-sizes 32 32 --no-anneal-lr --env Acrobot-v1"
    )
    config = tyro.cli(Config, args=text.split())
    expected = {"learning_rate": 0.001, "vf_clip_eps": None, "target_kl": 0.02, "hidden_sizes": (32, 32)}
    assert config == Config(env="Acrobot-v1", anneal_lr=False, **expected)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_timesteps": 500}, r"total_timesteps must be at least one update.*4 × 128 = 512, .*got 500"),
        ({"num_envs": 0}, "num_envs must be a whole number of at least 1, got 0"),
        ({"num_minibatches": 3}, r"num_minibatches must be a divisor of num_envs × num_steps = 512 .*got 3"),
        ({"num_minibatches": 512}, "leaves minibatches of at least 2, got 512"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"vf_clip_eps": -1.0}, "vf_clip_eps must be positive or None, got -1.0"),
        ({"ent_coef": -0.1}, "ent_coef must be at least 0, got -0.1"),
        ({"hidden_sizes": (64, 0)}, r"hidden_sizes must be widths of at least 1, got \(64, 0\)"),
        ({"env": "Cartpole-v1"}, "Did you mean CartPole-v1"),
        ({"env_params": ("gravty=1.0",)}, "Did you mean gravity"),
        ({"env_params": ("gravity=strong",)}, "env_params must be name=value with a value like 9.8"),
        ({"shared_trunk": True, "vf_learning_rate": 1e-3}, "vf_learning_rate must be None with shared_trunk"),
        ({"resume": True, "overwrite": True}, "resume and overwrite must be not both true"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        ppo.run(Config(**settings))


def test_other_environments_train():
    env, _ = make_environment("Catch-bsuite")
    config = dataclasses.replace(TINY, env="Catch-bsuite", shared_trunk=True, activation="relu")
    ppo.validate(config)
    state, metrics = jax.eval_shape(functools.partial(train, config=config), key_of(0))
    assert env.num_actions == state.train.params["policy"]["output"]["kernel"].shape[-1]
    assert metrics["episode/return_mean"].shape == (3,)
