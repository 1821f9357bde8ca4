"""What holds of every algorithm for environments: probes with known answers, vmap = loop, compiled = eager, errors."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.recipes.control import a2c, algorithm, dqn, grpo, ppo, reinforce, trpo
from jaxrl_llm.recipes.control.options import Agent, hyperparameters_of
from tests.recipes import probes
from tests.unchecked import unchecked

STEPS = {"num_envs": 4, "num_steps": 16, "hidden_sizes": (16,)}
EPISODES = {"num_envs": 16, "hidden_sizes": (16,)}
TINY = {
    "a2c": (a2c, a2c.Config(**STEPS, total_timesteps=128)),
    "ppo": (ppo, ppo.Config(**STEPS, total_timesteps=128, update_epochs=2, num_minibatches=2)),
    "trpo": (trpo, trpo.Config(**STEPS, total_timesteps=128, cg_iters=3, vf_iters=2)),
    "reinforce": (reinforce, reinforce.Config(**EPISODES, num_updates=2, env_params=("max_steps_in_episode=20",))),
    "grpo": (grpo, grpo.Config(**EPISODES, num_updates=2, env_params=("max_steps_in_episode=20",))),
    "dqn": (
        dqn,
        dqn.Config(
            num_envs=4,
            num_steps=8,
            hidden_sizes=(16,),
            total_timesteps=96,
            learning_starts=30,
            gradient_steps=3,
            batch_size=8,
            buffer_size=64,
            target_network_frequency=1,
            dueling=True,
            n_step=2,
        ),
    ),
}
each = pytest.mark.parametrize("name", TINY)


def some(*gate, without=()):
    """Parametrizes over all algorithms, of which only these are not slow."""
    named = [name for name in TINY if name not in without]
    names = [name if name in gate else pytest.param(name, marks=pytest.mark.slow) for name in named]
    return pytest.mark.parametrize("name", names)


@functools.cache
def trained(name, seed=0):
    module, config = TINY[name]
    return jax.jit(module.train, static_argnums=1)(jax.random.key(seed), config)


def probe(name, env, **settings):
    """Trains on a probe; returns a function of observations: the policy's output and the value, or action values."""
    module, config = TINY[name]
    config = dataclasses.replace(config, env=env, **({"env_params": ()} | settings))
    module.validate(config)
    state, _ = jax.jit(module.train, static_argnums=1)(jax.random.key(0), config)
    if name == "dqn":
        return functools.partial(config.q_values, state.train.online.params)
    return functools.partial(config.apply(), Agent(state.train.params))


ENDLESS = {
    "a2c": {"total_timesteps": 25_600, "learning_rate": 1e-2},
    "trpo": {"total_timesteps": 6400, "vf_iters": 20, "vf_lr": 1e-2},
    "reinforce": {"num_updates": 300, "learning_rate": 2e-2, "anneal_lr": False, "max_grad_norm": 100.0},
    "dqn": {"total_timesteps": 9600, "gradient_steps": 30, "learning_rate": 1e-2, "huber_delta": None},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_the_value_of_a_reward_that_only_a_time_limit_interrupts_is_that_of_the_endless_sum(name):
    # 1 / (1 - γ) = 10. Without bootstrapping through the limit of 8 steps it could be at most 5.7.
    found = probe(name, "Clock-probe", gamma=0.9, **ENDLESS[name])(jnp.ones((1, 1)))
    values = found if name == "dqn" else found[1]
    np.testing.assert_allclose(values, jnp.full(values.shape, 10.0), rtol=0.05)


EXAM = {
    "a2c": {"total_timesteps": 51_200, "learning_rate": 5e-3},
    "ppo": {"total_timesteps": 12_800, "learning_rate": 1e-2},
    "trpo": {"total_timesteps": 25_600, "max_kl": 0.05, "vf_iters": 20, "vf_lr": 1e-2},
    "reinforce": {"num_updates": 500, "num_envs": 32, "max_grad_norm": 10.0},
    "grpo": {"num_updates": 150, "num_envs": 64},
    "dqn": {
        "total_timesteps": 19_200,
        "gradient_steps": 20,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "anneal_lr": True,
    },
}


@pytest.mark.parametrize("name", EXAM)
def test_values_actions_and_credit_for_a_later_reward_are_learned_on_six_problems_at_once(name):
    observation, values, better = probes.exam(0.9)
    settings = {"gamma": 0.9, "hidden_sizes": (32,)} | EXAM[name]
    found = probe(name, "Exam-probe", **settings)(observation)
    matters = np.flatnonzero(better >= 0)
    if name == "dqn":
        np.testing.assert_allclose(found.max(1), values, atol=0.15)
        np.testing.assert_array_equal(found.argmax(1)[matters], better[matters])
        return
    logits, value = found
    assert (jax.nn.softmax(logits)[matters, better[matters]] > 0.9).all()
    if name != "grpo":  # which has no critic
        np.testing.assert_allclose(value, values, atol=0.2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("ppo", {"total_timesteps": 25_600, "learning_rate": 1e-2}, marks=pytest.mark.slow),
        pytest.param(
            "grpo",
            {"num_updates": 100, "learning_rate": 1e-2, "env_params": ("max_steps_in_episode=1",)},
            marks=pytest.mark.slow,
        ),
        ("trpo", {"total_timesteps": 12_800, "max_kl": 0.05}),
        pytest.param("a2c", {"total_timesteps": 51_200, "learning_rate": 5e-3}, marks=pytest.mark.slow),
        pytest.param(
            "reinforce",
            {"num_updates": 200, "env_params": ("max_steps_in_episode=1",)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_continuous_actions_find_their_target(name, settings):
    observations = jnp.linspace(-0.9, 0.9, 7)[:, None]
    (mean, log_std), _ = probe(name, "Reach-probe", **settings)(observations)
    np.testing.assert_allclose(mean, 0.5 * observations, atol=0.15)
    assert (jnp.exp(log_std) < 0.5).all()


@pytest.mark.slow
@some("dqn")
def test_vmapped_seeds_equal_separate_runs(name):
    module, config = TINY[name]
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    vmapped = jax.jit(jax.vmap(functools.partial(module.train, config=config)))(keys)
    for seed in range(2):
        lane = jax.tree.map(lambda x, seed=seed: x[seed], vmapped)
        chex.assert_trees_all_close(lane, trained(name, seed), rtol=2e-4, atol=1e-5)


SLOW = ("a2c", "reinforce", "dqn", "grpo")


@pytest.mark.parametrize(
    "name", ["trpo", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)  # PPO has its own
def test_a_compiled_update_equals_the_eager_one(name):
    module, config = TINY[name]
    init_key, update_key, _ = algorithm.split_run_key(jax.random.key(0))
    state = jax.jit(module.ALGORITHM.init, static_argnums=1)(init_key, config)
    _, eager = module.ALGORITHM.update(state, config, jax.random.fold_in(update_key, 0))
    first = {name: curve[0] for name, curve in trained(name)[1].items()}
    chex.assert_trees_all_close(eager, first, rtol=1e-3, atol=1e-5)


@each
def test_every_hyperparameter_may_be_traced(name):
    module, config = TINY[name]
    names = hyperparameters_of(config)
    values = {n: 0.5 for n in names if getattr(config, n) is None and (name, n) != ("grpo", "vf_learning_rate")}
    config = dataclasses.replace(config, **values)
    assert len(jax.tree.leaves(config)) >= 5
    assert len(jax.tree.leaves(config)) == len(names) - (name == "grpo")
    state, metrics = jax.eval_shape(module.train, jax.random.key(0), config)  # all leaves are traced
    assert state.update.shape == ()
    assert all(curve.shape == (2,) for curve in metrics.values())


@each
def test_steps_are_counted_exactly(name):
    _, config = TINY[name]
    state, metrics = trained(name)
    assert state.update == 2
    if name in ("reinforce", "grpo"):
        assert state.timesteps == (metrics["episode/length_mean"] * config.num_envs).sum()
    else:
        assert state.timesteps == {"dqn": 96}.get(name, 128)


@some("ppo", "reinforce", without=("dqn",))
def test_normalized_observations_and_rewards_train(name):
    module, config = TINY[name]
    options = {"normalize_observations": True} | ({"normalize_rewards": True} if hasattr(config, "num_steps") else {})
    config = dataclasses.replace(config, **options)
    state, metrics = jax.jit(module.train, static_argnums=1)(jax.random.key(0), config)
    assert state.normalizers.observations.count == state.timesteps
    assert np.isfinite(metrics["grad_norm"]).all()
    # The first rollout is seen as it is: no statistics were there.
    np.testing.assert_allclose(metrics["episode/length_mean"][0], trained(name)[1]["episode/length_mean"][0], rtol=1e-5)


def test_trpo_stays_in_its_trust_region_and_moves_the_value_network_apart():
    state, metrics = trained("trpo")
    assert (metrics["trpo/kl"] <= 0.01).all()
    assert (metrics["trpo/accepted"] == 1).all()
    module, config = TINY["trpo"]
    impossible = dataclasses.replace(config, accept_ratio=1e9)
    start = module.ALGORITHM.init(algorithm.split_run_key(jax.random.key(0))[0], impossible)
    state, metrics = jax.jit(module.train, static_argnums=1)(jax.random.key(0), impossible)
    assert (metrics["trpo/accepted"] == 0).all()
    chex.assert_trees_all_equal(state.train.policy.params, start.train.policy.params)  # not moved, to the bit
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.train.value.params, start.train.value.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_separate_learning_rates_move_policy_and_value_apart():
    module, config = TINY["ppo"]
    frozen = dataclasses.replace(config, vf_learning_rate=1e-12, normalize_advantage="batch", anneal_clip=True)
    start = module.init(algorithm.split_run_key(jax.random.key(0))[0], frozen)
    state, _ = jax.jit(module.train, static_argnums=1)(jax.random.key(0), frozen)
    chex.assert_trees_all_close(state.train.params["value"], start.train.params["value"], atol=1e-8)
    assert (
        np.abs(
            state.train.params["policy"]["output"]["kernel"] - start.train.params["policy"]["output"]["kernel"]
        ).max()
        > 1e-5
    )


def test_groups_start_in_the_same_state():
    from jaxrl_llm.recipes.control.episodes import play

    module, config = TINY["grpo"]
    state = module.ALGORITHM.init(jax.random.key(0), config)
    episodes, _ = jax.jit(play, static_argnums=(1, 3))(state, config, jax.random.key(1), 8)
    first = episodes.features[:, 0].reshape(2, 8, 4)
    np.testing.assert_array_equal(first, first[:, :1] + jnp.zeros_like(first))
    assert (first[0, 0] != first[1, 0]).all()
    assert len(np.unique(episodes.action[:8, :5], axis=0)) > 1  # but their actions differ
    # Where each episode counts alike and the ratio is one, the loss is minus the mean advantage, which is zero.
    alike = dataclasses.replace(config, update_epochs=1, loss_type="grpo")
    _, metrics = module.learn(state.train, episodes, alike, jax.random.key(2))
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-6)


def test_exploration_falls_linearly_and_then_stays():
    _, config = TINY["dqn"]
    state, _ = trained("dqn")
    config = dataclasses.replace(config, total_timesteps=32 + 1000 * 32, exploration_fraction=0.5, end_e=0.1)
    assert config.num_updates == 1000
    found = [dqn.exploration(state._replace(update=jnp.array(update)), config) for update in (0, 250, 500, 900)]
    np.testing.assert_allclose(found, [1.0, 0.55, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dqn", {"env": "Pendulum-v1"}, "env must be an environment with discrete actions"),
        ("dqn", {"buffer_size": 10}, "buffer_size must be at least the 32 steps put in at once, got 10"),
        (
            "dqn",
            {"total_timesteps": 60},
            r"total_timesteps must be at least one update after learning_starts, 32 \+ 32",
        ),
        ("dqn", {"n_step": 9}, "n_step must be at most num_steps=8, got 9"),
        ("dqn", {"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ("trpo", {"shared_trunk": True}, "shared_trunk must be false: the value network would move the policy"),
        ("trpo", {"max_kl": 0.0}, "max_kl must be positive, got 0.0"),
        ("trpo", {"backtrack_coef": 1.0}, r"backtrack_coef must be in \(0, 1\), got 1.0"),
        ("grpo", {"num_envs": 12}, "num_envs must be a multiple of num_generations=8, got 12"),
        (
            "reinforce",
            {"baseline": "none", "vf_learning_rate": 0.1},
            "vf_learning_rate must be None where baseline is none",
        ),
        (
            "reinforce",
            {"baseline": "none", "vf_coef": 1.0},
            "vf_coef must be as it is by default where baseline is none",
        ),
        ("a2c", {"optim": "sgd", "adam_epsilon": 1e-3}, "adam_epsilon must be as it is by default, for plain steps"),
        ("trpo", {"num_envs": 1, "num_steps": 1}, "num_steps must be at least 2 with num_envs=1"),
        ("a2c", {"seed": 2**31}, "seed must be at most 2147483647, which leaves seeds for all runs, got 2147483648"),
        (
            "a2c",
            {"env_params": ("gravity=1.0", "gravity=2.0")},
            "env_params must name each parameter once, got gravity",
        ),
        ("a2c", {"logging_steps": 5}, "logging_steps must be 1: updates_per_step says"),
        ("a2c", {"vf_coef": -1.0}, "vf_coef must be at least 0, got -1.0"),
        ("a2c", {"env": "Acrobat-v1"}, "Did you mean Acrobot-v1"),
    ],
)
def test_wrong_settings_are_refused_by_name(name, settings, message):
    module, config = TINY[name]
    with pytest.raises(ValueError, match=message):
        module.run(dataclasses.replace(config, **settings))


def test_names_that_are_not_known_are_refused():
    for name, settings, message in [
        ("reinforce", {"baseline": "mean"}, "baseline must be value or none, got 'mean'"),
        ("a2c", {"optim": "lion"}, "optim must be adam, rmsprop or sgd, got 'lion'"),
        ("grpo", {"loss_type": "dapo"}, "loss_type must be one of .*bnpo.*grpo.*got 'dapo'"),
        ("ppo", {"normalize_advantage": "all"}, "normalize_advantage must be one of .*got 'all'"),
    ]:
        module, config = TINY[name]
        with unchecked():
            config = dataclasses.replace(config, **settings)
        with pytest.raises(ValueError, match=message):
            module.validate(config)


NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}


@pytest.mark.slow
@pytest.mark.parametrize(  # PPO has a test of its own, not a slow one
    ("name", "settings"),
    [
        ("trpo", {"grid": ("max_kl=0.01,0.02",)}),
        ("grpo", {}),
        ("dqn", {}),
        ("reinforce", {"normalize_observations": True}),
        ("a2c", NORMALIZED | {"grid": ("gamma=0.9,0.99",), "num_seeds": 2}),
    ],
)
def test_a_run_resumes_bit_for_bit(name, settings, tmp_path):
    module, config = TINY[name]
    config = dataclasses.replace(config, **settings)
    config = dataclasses.replace(
        config, updates_per_step=1, save_steps=1, save_total_limit=9, eval_episodes=2, output_dir=str(tmp_path / "run")
    )
    figures = module.run(config)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    assert str(module.run(dataclasses.replace(config, resume=True))) == str(figures)  # which may hold NaN
    strip = lambda line: line[: line.rindex('"time"')]  # noqa: E731
    again = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert list(map(strip, again)) == list(map(strip, lines))
