"""Every gymnax environment resets, steps and trains; runs over several devices; the sweep, and playing its agents."""

import contextlib
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from jaxrl_llm import cli
from jaxrl_llm.recipes.control import dqn, play, ppo, reinforce, trpo
from jaxrl_llm.training.parallel import make_mesh, partition_spec
from tests.recipes import probes  # noqa: F401

DOWNLOADS = ("MNISTBandit-bsuite",)
PROBES = ("Clock-probe", "Exam-probe", "Reach-probe")
NAMES = [name for name in gymnax.registered_envs if name not in (*DOWNLOADS, *PROBES) and "test" not in name]
TINY = ppo.Config(num_envs=4, num_steps=8, total_timesteps=64, update_epochs=1, num_minibatches=2, hidden_sizes=(8,))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_environment_trains(name):
    promotes = jax.numpy_rank_promotion("allow") if name == "Swimmer-misc" else contextlib.nullcontext()
    with promotes:
        for module, config in (
            (ppo, TINY),
            (trpo, trpo.Config(num_envs=4, num_steps=8, total_timesteps=64, vf_iters=2)),
        ):
            config = dataclasses.replace(config, env=name, normalize_observations=True)
            module.validate(config)
            state, metrics = jax.jit(module.train, static_argnums=1)(jax.random.key(0), config)
            assert state.timesteps == 64
            assert np.isfinite(metrics["grad_norm"]).all()


@pytest.mark.parametrize("name", ["Swimmer-misc", "FrozenLake-misc", "FourRooms-misc", "Pong-misc"])
def test_observations_and_actions_of_all_kinds_are_read(name):
    promotes = jax.numpy_rank_promotion("allow") if name == "Swimmer-misc" else contextlib.nullcontext()
    with promotes:
        state, metrics = jax.eval_shape(
            lambda key: ppo.train(key, dataclasses.replace(TINY, env=name)), jax.random.key(0)
        )
    assert metrics["loss"].shape == (2,)
    assert ("log_std" in state.train.params) == (name == "Swimmer-misc")


@pytest.mark.slow
def test_seeds_on_several_devices_and_environments_on_several_devices_give_the_same_run():
    update = jax.jit(ppo.update, static_argnums=1)
    start = ppo.init(jax.random.key(0), TINY)
    expected, metrics = update(start, TINY, jax.random.key(1))
    # One run whose environments are spread over four devices: XLA divides the rollout, and joins the gradients.
    mesh = jax.make_mesh((4,), ("envs",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.device_put(start.environments, NamedSharding(mesh, PartitionSpec("envs")))
    rest = jax.device_put(start._replace(environments=None), NamedSharding(mesh, PartitionSpec()))
    again, spread_metrics = update(rest._replace(environments=spread), TINY, jax.random.key(1))
    assert len(again.environments.observation.sharding.device_set) == 4
    chex.assert_trees_all_close((again, spread_metrics), (expected, metrics), rtol=1e-4, atol=1e-5)
    # Runs of two seeds, a device for each.
    make_keys = jax.vmap(jax.random.key)
    on_devices = jax.pmap(ppo.train, static_broadcasted_argnums=1)(make_keys(jnp.arange(2)), TINY)
    on_one = jax.jit(jax.vmap(lambda key: ppo.train(key, TINY)))(make_keys(jnp.arange(2)))
    chex.assert_trees_all_close(jax.device_get(on_devices), jax.device_get(on_one), rtol=1e-4, atol=1e-5)
    mesh = jax.make_mesh((2,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    seeds = PartitionSpec("seeds")
    train = jax.vmap(lambda key: ppo.train(key, TINY))
    mapped = jax.shard_map(train, mesh=mesh, in_specs=seeds, out_specs=seeds, check_vma=False)
    chex.assert_trees_all_close(
        jax.device_get(jax.jit(mapped)(make_keys(jnp.arange(2)))), jax.device_get(on_one), rtol=1e-4, atol=1e-5
    )


SWEEP = (
    "sweep ppo --num-envs 2 --num-steps 16 --total-timesteps 64 --update-epochs 1 --num-minibatches 2 --hidden-sizes 8 "
)
GRID = "--grid learning-rate=1e-3,1e-2 --num-seeds 2 --eval-episodes 3 "


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two learning rates with two seeds, by the command line."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    cli.main([*(SWEEP + GRID).split(), "--output-dir", str(folder)])
    return folder


def last_metrics(folder):
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if name != "time"}


def test_the_runs_of_a_sweep_are_divided_over_devices(swept, tmp_path):
    cli.main([*(SWEEP + GRID).split(), "--output-dir", str(tmp_path / "run"), "--mesh", "data=4"])
    chex.assert_trees_all_close(last_metrics(tmp_path / "run"), last_metrics(swept), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data=2", []),
        ("data=2", ["--normalize-observations", "--normalize-rewards"]),
        ("fsdp=4", []),
        ("tensor=2", []),
        ("data=2,fsdp=2,tensor=2", []),
    ],
)
def test_a_run_is_divided_over_devices_and_a_checkpoint_moves_between_them(tmp_path, mesh, options):
    command = SWEEP.replace("envs 2", "envs 4").replace("timesteps 64", "timesteps 128")
    words = [*command.split(), "--eval-episodes", "3", "--updates-per-step", "1", "--save-steps", "1", *options]
    for name, devices in (("one", ""), ("mesh", mesh)):
        cli.main([*words, "--output-dir", str(tmp_path / name), "--mesh", devices])
    chex.assert_trees_all_close(last_metrics(tmp_path / "mesh"), last_metrics(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "mesh/checkpoints/2")
    cli.main([*words, "--output-dir", str(tmp_path / "mesh"), "--mesh", "", "--resume"])
    chex.assert_trees_all_close(last_metrics(tmp_path / "mesh"), last_metrics(tmp_path / "one"), rtol=1e-5, atol=1e-6)


def test_networks_of_control_are_divided_too():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert partition_spec("train/opt_state/2/mu/policy/hidden_0/kernel", (1, 4, 64), mesh) == P(None, "fsdp", "tensor")
    assert partition_spec("train/params/value/output/kernel", (1, 64, 1), mesh) == P()


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (ppo, {"mesh": "data=99"}, "mesh data=99,fsdp=1,tensor=1 has 99 devices, and there are 8"),
        (ppo, {"mesh": "data=3"}, "mesh must be of a number that divides the runs, 1, or of num_envs=4, got 'data=3'"),
        (
            reinforce,
            {"mesh": "data=2", "num_seeds": 3},
            "mesh must be of a number that divides the runs, 3, got 'data=2'",
        ),
    ],
)
def test_devices_that_cannot_share_the_work_are_refused(module, settings, message, tmp_path):
    base = {"num_envs": 4, "hidden_sizes": (8,), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message):
        module.run(module.Config(**base, **settings))
    assert not (tmp_path / "run").exists()


def test_a_sweep_trains_every_point_of_the_grid_with_every_seed(swept):
    names = [f"learning_rate={rate}/seed_{seed}" for rate in ("0.001", "0.01") for seed in (0, 1)]
    assert json.loads((swept / "config.json").read_text())["algorithm"] == "ppo"
    assert (swept / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    line = json.loads((swept / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"{name}/episode/return_mean" for name in names} <= set(line)
    alone = ppo.Config(
        num_envs=2,
        num_steps=16,
        total_timesteps=64,
        update_epochs=1,
        num_minibatches=2,
        hidden_sizes=(8,),
        learning_rate=1e-2,
    )
    state, _ = jax.jit(ppo.train, static_argnums=1)(jax.random.key(1), alone)
    loaded = play.load_agent(swept, "learning_rate=0.01/seed_1")
    chex.assert_trees_all_close(loaded.agent.params, state.train.params, rtol=1e-4, atol=1e-6)
    assert loaded.config.learning_rate == pytest.approx(0.01)


def test_what_draws_an_environment_may_be_missing(swept, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ValueError, match=r"render needs pygame for CartPole-v1.*pip install 'jaxrl-llm\[render\]'"):
        play.run(play.Config(run_dir=str(swept), num_episodes=1, render=str(tmp_path / "episode.gif")))


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_an_agent_of_a_sweep_is_played_and_drawn(swept, tmp_path, ending):
    picture = tmp_path / f"episode.{ending}"
    figures = play.run(play.Config(run_dir=str(swept), num_episodes=5, render=str(picture), policy="sampled", frames=3))
    assert figures["agent"].startswith("learning_rate=0.0")
    assert 5 < figures["sampled/return_mean"] < 100
    assert figures["greedy/length_mean"] == figures["greedy/return_mean"]
    assert picture.read_bytes()[:4] == {"gif": b"GIF8", "png": b"\x89PNG"}[ending]


def test_agents_and_runs_that_are_not_there_are_refused(swept, tmp_path):
    with pytest.raises(ValueError, match=r"agent must be best or one of learning_rate=0.001/seed_0, .*got 'seed_9'"):
        play.run(play.Config(run_dir=str(swept), agent="seed_9"))
    with pytest.raises(FileNotFoundError, match="run_dir must be the output_dir of a control run"):
        play.run(play.Config(run_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"render must be a .gif or .png file, got 'x.mp4'"):
        play.run(play.Config(run_dir=str(swept), render="x.mp4"))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (("num_envs=1,2",), "grid must be name=value,value,… of learning_rate"),
        (("gamma=high",), "grid must be name=value,value,….*got 'gamma=high'"),
        (("gamma=0.9", "gamma=0.8"), "grid must be"),
        (("gamma=0.9,1.5",), r"gamma must be in \[0, 1\], got 1.5"),
        (("gamma=0.9,0.90000000001",), "grid must be values that differ from one another, got 'gamma=0.9,0.9"),
    ],
)
def test_wrong_grids_are_refused(grid, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ppo.run(dataclasses.replace(TINY, grid=grid, output_dir=str(tmp_path / "run")))
    assert not Path(tmp_path / "run").exists()


def test_an_environment_without_a_picture_is_drawn_by_its_observations(tmp_path):
    config = dqn.Config(
        env="Clock-probe",
        num_steps=8,
        total_timesteps=40,
        learning_starts=8,
        gradient_steps=1,
        batch_size=4,
        buffer_size=64,
        hidden_sizes=(4,),
        eval_episodes=2,
        output_dir=str(tmp_path / "run"),
    )
    assert dqn.run(config)["eval/greedy_return"] == 8
    picture = tmp_path / "observations.png"
    assert play.run(play.Config(run_dir=config.output_dir, num_episodes=2, render=str(picture)))["agent"] == "seed_0"
    assert picture.read_bytes()[:4] == b"\x89PNG"
