"""What goes wrong in a run that learns from its own completions: killed processes, rewards that hang, odd completions."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import PromptExample, character_tokenizer
from jaxrl_llm.models import GPT2
from jaxrl_llm.recipes.text import grpo, ppo, reinforce, reward_model, rloo, trpo
from jaxrl_llm.recipes.text.experience import Policy
from jaxrl_llm.recipes.text.iteration import (
    Method,
    OnlineState,
    as_rollout,
    iteration_keys,
    make_sampler,
    make_update,
    start_state,
)
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, save_model
from jaxrl_llm.recipes.text.online import load_parts, load_rewards
from jaxrl_llm.recipes.text.prompts import HostRewards, Prompts, load_host_rewards, make_prompt_table
from jaxrl_llm.rewards import RewardError
from jaxrl_llm.rollouts import Completions
from tests.recipes.runs import TINY, assert_same_run, curve, renamed, write_rows

RECIPES = {"grpo": grpo, "rloo": rloo, "reinforce": reinforce, "ppo": ppo, "trpo": trpo}
EOS = (1, 5)
"""`<eos>`, and a second one that ends completions as well: the character 2."""
GROUP = 6
PROMPTS = Prompts(jnp.array([[0, 3], [4, 6]]), jnp.array([[False, True], [True, True]]), {})
ROWS = 2 * GROUP
FAST = {"xla_backend_optimization_level": 0}
"""Compiles in half the time."""


class Setting(NamedTuple):
    """A method with its compiled updates, and a state to start from."""

    method: Method
    update: Any
    start: OnlineState
    model: LanguageModel

    def policy_of(self, state):
        return self.method.policy_params(state.train.params)


@functools.cache
def two_eos_model():
    model = load_model(grpo.Config(**TINY), jax.random.key(0))
    assert isinstance(model.module, GPT2)
    config = dataclasses.replace(model.module.config, eos_token_id=EOS)
    return model._replace(module=model.module.clone(config=config))


@functools.cache
def setting_of(name, **options):
    model, recipe = two_eos_model(), RECIPES[name]
    learned = {} if name == "trpo" else {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    own = {"ppo": {"num_iterations": 1, "missing_eos_penalty": 1.0, "value_network": "shared"}, "rloo": {"beta": 0.0}}
    sizes = {"num_prompts": 2, "num_generations": GROUP, "max_completion_length": 3}
    config = recipe.Config(**TINY, **sizes, **learned, **own.get(name, {}), mask_truncated_completions=True, **options)
    recipe.validate(config)
    method = recipe.make_method(model, config) if name == "ppo" else recipe.make_method(config)
    optimizer = trpo.make_optimizer(config) if name == "trpo" else config.optimizer(10)
    policy = Policy(model.apply, model.head_kernel)
    update = make_update(policy, optimizer, method, config, eos_ids=model.eos_ids)
    start = start_state(method, method.start(jax.random.key(1), model.params), optimizer)
    return Setting(method, jax.jit(update, compiler_options=FAST), start, model)


@functools.cache
def sampler():
    """The methods differ in what they make of completions; they sample alike."""
    model, config = two_eos_model(), grpo.Config(num_generations=GROUP, max_completion_length=3)
    policy = Policy(model.apply, model.head_kernel)
    sample = make_sampler(policy, config, eos_ids=model.eos_ids, pad_id=model.pad_id)
    return jax.jit(sample, compiler_options=FAST)


def leaning(setting, **logits):
    """The state with a policy that adds to the logits of its tokens: `eos`, or `other_eos`."""
    wanted = np.zeros(len(setting.model.tokenizer), np.float32)
    for name, value in logits.items():
        wanted[{"eos": EOS[0], "other_eos": EOS[1]}[name]] = value
    policy = setting.policy_of(setting.start)
    embedding = policy["token_embedding"]["embedding"]
    shift = jnp.linalg.pinv(embedding) @ wanted
    norm = policy["final_norm"]
    policy = policy | {"final_norm": norm | {"bias": norm["bias"] + shift}}
    params = setting.start.train.params
    params = params._replace(policy=policy) if hasattr(params, "policy") else policy
    return setting.start._replace(train=setting.start.train._replace(params=params))


def iterate(setting, state, scores, seed=0):
    """An iteration in which the rewards of the completions are those given."""
    sample_key, update_key = iteration_keys(jax.random.key(seed), state)
    completions = sampler()(setting.policy_of(state), sample_key, PROMPTS)
    rollout = as_rollout(PROMPTS, completions, jnp.asarray(scores, jnp.float32), GROUP)
    state, metrics = setting.update(state, None, rollout, update_key)
    return state, metrics, rollout


UNEQUAL = np.linspace(-1, 1, ROWS)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def assert_no_step(setting, before, after, metrics):
    """The policy is the same, bit for bit. (The step of Adam is as large for a rounding error as for a gradient.)"""
    chex.assert_trees_all_equal(setting.policy_of(after), setting.policy_of(before))
    assert_finite(after)
    assert_finite(metrics)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("value", [0.0, 1.7, -2.2])
def test_equal_rewards_move_no_policy(name, value):
    setting = setting_of(name)
    before = leaning(setting, eos=2.0)
    after, metrics, rollout = iterate(setting, before, np.full(ROWS, value))
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["reward_std"] == pytest.approx(0, abs=1e-6)
    assert metrics["reward"] == pytest.approx(value, abs=1e-6)
    assert 0 < metrics["completions/clipped_ratio"] < 1
    if name == "ppo":  # Its baseline is a critic, which has to learn first.
        assert_finite((after, metrics))
        return
    assert metrics["grad_norm"] == 0
    assert_no_step(setting, before, after, metrics)
    # The same completions with other rewards do move it.
    moved, metrics, again = iterate(setting, before, UNEQUAL)
    chex.assert_trees_all_equal(again.completions, rollout.completions)
    assert metrics["grad_norm"] > 1e-3
    assert np.any(setting.policy_of(moved)["final_norm"]["bias"] != setting.policy_of(before)["final_norm"]["bias"])


@pytest.mark.parametrize("name", RECIPES)
def test_where_no_reward_applies_in_an_iteration_nothing_moves_and_the_next_one_learns(name):
    setting = setting_of(name)
    before = leaning(setting, eos=2.0)
    after, metrics, _ = iterate(setting, before, np.full(ROWS, np.nan))
    assert metrics["grad_norm"] == 0
    assert metrics["reward"] == 0
    assert metrics["frac_reward_zero_std"] == 1
    assert_no_step(setting, before, after, metrics)
    chex.assert_trees_all_equal(after.train.params, before.train.params)  # the critic too
    later, metrics, _ = iterate(setting, after, UNEQUAL)
    assert metrics["grad_norm"] > 1e-3
    assert_finite((later, metrics))


@pytest.mark.parametrize("name", RECIPES)
def test_empty_completions_are_one_token_long_and_learned_from(name):
    setting = setting_of(name)
    after, metrics, rollout = iterate(setting, leaning(setting, eos=30.0), UNEQUAL)
    ids, mask, *_ = rollout.completions
    np.testing.assert_array_equal(ids, [[EOS[0], 0, 0]] * ROWS)
    np.testing.assert_array_equal(mask, [[True, False, False]] * ROWS)
    assert metrics["completions/clipped_ratio"] == 0
    for which in ("mean", "min", "max"):
        assert metrics[f"completions/{which}_length"] == pytest.approx(1)
        assert metrics[f"completions/{which}_terminated_length"] == pytest.approx(1)
    assert metrics["reward_std"] > 0.3
    assert_finite((after, metrics))


@pytest.mark.parametrize("name", RECIPES)
def test_completions_that_never_end_are_counted_and_where_they_are_masked_nothing_moves(name):
    setting = setting_of(name)
    before = leaning(setting, eos=-30.0, other_eos=-30.0)
    after, metrics, rollout = iterate(setting, before, UNEQUAL)
    assert rollout.completions.mask.all()
    assert not np.isin(rollout.completions.ids, EOS).any()
    assert metrics["completions/clipped_ratio"] == 1
    assert metrics["completions/mean_length"] == 3
    for which in ("mean", "min", "max"):
        assert metrics[f"completions/{which}_terminated_length"] == 0
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert_no_step(setting, before, after, metrics)
    chex.assert_trees_all_equal(after.train.params, before.train.params)


def test_completions_that_were_cut_are_not_learned_from_and_the_others_are():
    setting = setting_of("grpo")
    before = leaning(setting, eos=2.0, other_eos=2.0)
    after, metrics, rollout = iterate(setting, before, UNEQUAL)
    last = rollout.completions.mask.sum(-1) - 1
    ended = np.isin(np.asarray(rollout.completions.ids)[np.arange(ROWS), last], EOS)
    assert 0 < ended.sum() < ROWS
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - ended.mean())
    assert metrics["completions/mean_terminated_length"] == pytest.approx((last + 1)[ended].mean())
    # Other tokens in the rows that were cut change nothing, as long as these have the same rewards.
    ids = jnp.where(ended[:, None], rollout.completions.ids, 12)
    other = rollout._replace(completions=rollout.completions._replace(ids=ids))
    assert np.any(ids != rollout.completions.ids)
    _, update_key = iteration_keys(jax.random.key(0), before)
    again, metrics = setting.update(before, None, other, update_key)
    chex.assert_trees_all_equal(again.train.params, after.train.params)
    assert metrics["grad_norm"] > 1e-3


def test_a_completion_ends_at_the_first_of_several_eos():
    setting = setting_of("grpo")
    state = leaning(setting, eos=1.0, other_eos=1.0)
    rollouts = [iterate(setting, state, UNEQUAL, seed)[1:] for seed in range(8)]
    ids, mask = (
        np.concatenate([getattr(rollout.completions, name) for _, rollout in rollouts]) for name in ("ids", "mask")
    )
    ends = np.isin(ids, EOS)
    # Written out: a token counts if no EOS stands before it, and what does not count is padding.
    expected = [[not any(row[:t]) for t in range(3)] for row in ends]
    np.testing.assert_array_equal(mask, expected)
    assert (ids[~mask] == 0).all()
    for eos in EOS:
        for position in range(3):
            assert (mask & (ids == eos))[:, position].any()
    clipped = [float(metrics["completions/clipped_ratio"]) for metrics, _ in rollouts]
    np.testing.assert_allclose(clipped, 1 - ends.any(-1).reshape(8, ROWS).mean(-1), atol=1e-6)
    assert np.std(clipped) > 0


def test_ppo_takes_the_penalty_of_a_missing_eos_off_where_none_of_them_came():
    setting = setting_of("ppo")
    scores = [
        iterate(setting, leaning(setting, **logits), np.ones(ROWS))[1]["objective/scores"]
        for logits in ({"eos": 30.0}, {"other_eos": 30.0}, {"eos": -30.0, "other_eos": -30.0})
    ]
    assert scores == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_that_is_not_finite_is_counted_and_everything_is_kept(name):
    setting = setting_of(name)
    before = leaning(setting, eos=2.0)
    after, metrics, _ = iterate(setting, before, np.where(np.arange(ROWS) == 3, np.inf, UNEQUAL))
    assert metrics["grad_nonfinite"] == 1
    assert after.train.step == before.train.step + 1
    chex.assert_trees_all_equal(after.train.params, before.train.params)
    if name != "trpo":  # whose state is a report
        chex.assert_trees_all_equal(after.train.opt_state, before.train.opt_state)
    later, metrics, _ = iterate(setting, after, UNEQUAL)
    assert metrics["grad_nonfinite"] == 0
    assert_finite((later, metrics))


@pytest.mark.parametrize("name", RECIPES)
def test_a_parameter_that_is_not_a_number_is_counted_and_spreads_no_further(name):
    setting = setting_of(name)
    before = leaning(setting, eos=2.0)
    policy = setting.policy_of(before)
    policy["final_norm"]["scale"] = policy["final_norm"]["scale"].at[3].set(jnp.nan)
    after, metrics, rollout = iterate(setting, before, UNEQUAL)
    assert metrics["grad_nonfinite"] == 1
    chex.assert_trees_all_equal(after.train.params, before.train.params)
    assert ((rollout.completions.ids >= 0) & (rollout.completions.ids < 14)).all()


# Whole runs, with rewards on the host.

REWARDS = """
import pathlib, time

calls = 0

def sevens(completions, **columns):
    return [text.count("7") - 0.1 * len(text) for text in completions]

def hangs(completions, **columns):
    '''At the second call for as many completions as an iteration has.'''
    global calls
    calls += len(completions) == 16
    if calls == 2:
        calls += 1
        wait()
    return [float(len(text)) for text in completions]

def wait(**columns):
    time.sleep(600)
    pathlib.Path(__file__).with_name("woke up").touch()

def hangs_at_once(completions):
    wait()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The longest prompt and its completion just fit: 14 tokens, and 3 of which the last is not read."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(4)] + [{"prompt": "1+2+3+4+5+6+7="}] * 4
    return {
        **TINY,
        "dataset": write_rows(folder / "prompts.jsonl", rows),
        "eval_fraction": 0.2,
        "num_prompts": 4,
        "num_generations": 4,
        "max_completion_length": 3,
        "reward_funcs": (f"{folder / 'rewards.py'}:sevens",),
        "max_steps": 6,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
    }


# Kills its own process in iteration n: at the second time that the compiled program calls the model to sample, or computes
# the loss (of four times); or while it writes checkpoint n, at the first file of it.
KILLED = """
import importlib, json, os, signal, sys
import jax
from jaxrl_llm.recipes.text import iteration, online

name, phase, moment, settings = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
seen = {"iterations": 0, "calls": 0}

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def keys(*args, keys=online.iteration_keys):
    seen["iterations"] += 1
    return keys(*args)

def count():
    seen["calls"] += seen["iterations"] == moment
    if seen["calls"] == 2:
        kill()

def counted(function):
    def call(*args, **kwargs):
        jax.debug.callback(count)
        return function(*args, **kwargs)
    return call

def generate(apply, *args, generate=iteration.generate, **kwargs):
    return generate(counted(apply), *args, **kwargs)

def make_train_step(loss_fn, *args, make=iteration.make_train_step, **kwargs):
    return make(counted(loss_fn), *args, **kwargs)

def hook(event, arguments):
    if event == "open" and f"/{moment}.orbax-checkpoint-tmp" in str(arguments[0]):
        kill()

online.iteration_keys = keys
if phase == "sampling":
    iteration.generate = generate
elif phase == "update":
    iteration.make_train_step = make_train_step
else:
    sys.addaudithook(hook)
recipe = importlib.import_module(f"jaxrl_llm.recipes.text.{name}")
settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
recipe.run(recipe.Config(**settings))
"""

METHODS = {
    "grpo": {"learning_rate": 1e-2},
    "ppo": {
        "learning_rate": 1e-2,
        "num_iterations": 2,
        "num_minibatches": 2,
        "value_network": "shared",
        "target_kl": 1.0,
    },
    "trpo": {"max_kl": 0.1},
}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The settings of a run that nothing interrupts, by the name of the method."""

    @functools.cache
    def run(name):
        config = RECIPES[name].Config(**base, **METHODS[name], output_dir=str(tmp_path_factory.mktemp(name) / "whole"))
        figures = RECIPES[name].run(config)
        assert figures["eval_reward"] != figures["eval_reward_before"]
        return config

    return run


def samples(folder):
    return Path(folder, "samples.jsonl").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param("grpo", "checkpoint", marks=pytest.mark.slow),
        pytest.param("grpo", "sampling", marks=pytest.mark.slow),
        pytest.param("ppo", "update", marks=pytest.mark.slow),
        pytest.param("trpo", "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_leaves_a_run_that_resumes_bit_for_bit(name, phase, whole, programs):
    config = renamed(whole(name), phase)
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # this and the next as `quick_compilation` does here
    environment["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    command = [sys.executable, "-c", KILLED, name, phase, "4", json.dumps(dataclasses.asdict(config))]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    folder = Path(config.output_dir)
    half_written = [path.name for path in (folder / "checkpoints").glob("*tmp*")]
    assert len(half_written) == (phase == "checkpoint")
    assert (folder / "checkpoints/2").exists()
    assert not (folder / "checkpoints/4").exists()
    # More was done, and logged, than the newest checkpoint holds.
    assert curve(folder)[-1]["step"] == (4 if phase == "checkpoint" else 3)
    RECIPES[name].run(dataclasses.replace(config, resume=True))
    assert_same_run(whole(name).output_dir, folder)
    assert samples(whole(name).output_dir) == samples(folder)
    assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.fixture
def hanging(base, tmp_path):
    """Makes settings of a run with a reward that hangs for ten minutes beside another one."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    own = {"output_dir": str(tmp_path / "run"), "reward_timeout": 1.0, "max_steps": 3}

    def settings(name, **changes):
        functions = tuple(f"{tmp_path / 'rewards.py'}:{function}" for function in ("sevens", name))
        return grpo.Config(**base | METHODS["grpo"] | own | {"reward_funcs": functions} | changes)

    return settings


def test_a_reward_that_hangs_stops_the_run_with_its_name(hanging, tmp_path):
    message = r"Reward 'hangs_at_once' took longer than the timeout of 1 s for 4 completions.*reward_errors=\"ignore\""
    with pytest.raises(RewardError, match=message):
        grpo.run(hanging("hangs_at_once"))
    assert not (tmp_path / "woke up").exists()


def test_a_reward_that_hangs_may_be_ignored_and_is_counted(hanging, tmp_path):
    config = hanging("hangs", reward_errors="ignore")
    figures = grpo.run(config)
    assert not (tmp_path / "woke up").exists()
    assert np.isfinite(figures["eval_reward"])
    lines = curve(config.output_dir)[1:]
    assert [line["rewards/hangs/errors"] for line in lines] == [0, 16, 0]
    assert [line["rewards/sevens/errors"] for line in lines] == [0, 0, 0]
    assert lines[1]["rewards/hangs/mean"] == "NaN"
    # What is left of the reward is the other function's.
    assert lines[1]["reward"] == pytest.approx(lines[1]["rewards/sevens/mean"], abs=1e-6)
    assert lines[2]["reward"] != pytest.approx(lines[2]["rewards/sevens/mean"], abs=1e-3)


def test_a_prompt_and_completion_that_just_fit_into_the_context_are_learned_from(whole):
    config = whole("grpo")
    parts = load_parts(config, jax.random.key(0))
    assert parts.train.longest + config.max_completion_length - 1 == parts.model.context_length == 16
    assert parts.train.length == 14
    rows = [json.loads(line) for line in samples(config.output_dir).splitlines()]
    assert {len(row["prompt"]) for row in rows} == {4, 14}
    lines = curve(config.output_dir)[1:]
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-4


@pytest.mark.parametrize("longer", [{"max_completion_length": 4}, {"n_positions": 15}])
def test_a_token_more_than_the_context_holds_is_refused_with_the_cure(base, longer, tmp_path):
    config = grpo.Config(**base | longer, output_dir=str(tmp_path))
    cure = r"and 1[67] are needed: lower max_prompt_length or max_completion_length"
    with pytest.raises(ValueError, match=cure):
        grpo.run(config)
    parts = load_parts(dataclasses.replace(config, max_prompt_length=13), jax.random.key(0))
    assert parts.train.longest == 4  # longer ones are left out


# Several EOS outside of an iteration.


def test_a_saved_model_keeps_all_its_eos(tmp_path):
    model = two_eos_model()
    save_model(tmp_path / "model", model, model.params)
    loaded = load_model(grpo.Config(model=str(tmp_path / "model")), jax.random.key(1))
    assert loaded.eos_ids == EOS
    assert loaded.module.config.eos_token_id == EOS


def completions_of(rows):
    """Completions of three tokens as a sampler gives them."""
    ids = np.array([row + [0] * (3 - len(row)) for row in rows], np.int32)
    mask = np.arange(3) < np.array([len(row) for row in rows])[:, None]
    nothing = jnp.zeros(ids.shape)
    return Completions(jnp.array(ids), jnp.array(mask), nothing, nothing)


def test_a_traced_reward_is_given_all_eos():
    model = two_eos_model()
    config = grpo.Config(reward_funcs=("exact_match_tokens",), traceable_rewards=True)
    table = make_prompt_table(model, [PromptExample("3+4=", {"answer": "7"})], max_prompt_length=8)
    seven = 10
    completions = completions_of([[seven, 1], [seven, 5], [seven, seven, 5], [5]])
    scores, _ = load_rewards(model, config)(table, np.arange(1), completions)
    assert scores[:, 0].tolist() == [1, 1, 0, 0]


def test_a_reward_model_of_other_tokens_reads_an_end_where_any_eos_was_sampled(tmp_path):
    model = two_eos_model()
    tokenizer = character_tokenizer("+0123456789=")
    tokenizer.add_special_tokens({"additional_special_tokens": ["2"]})  # as a second EOS is
    model = model._replace(tokenizer=tokenizer)
    options = dataclasses.replace(grpo.Config(**TINY), tokenizer="characters:!+0123456789=")
    scorer = reward_model.load_reward_model(options, jax.random.key(1))
    save_model(tmp_path, scorer, scorer.params)
    rewards = load_host_rewards(model, [f"reward_model:{tmp_path}"])
    table = make_prompt_table(model, [PromptExample("3+4=", {})], max_prompt_length=8)
    scores, _ = rewards(table, np.arange(1), completions_of([[10, 1], [10, 5], [10]]))
    assert scores[1, 0] == scores[0, 0]
    assert scores[2, 0] != scores[0, 0]


def test_rewards_read_an_empty_completion_as_an_empty_text():
    model = two_eos_model()
    read = []

    def reader(completions, completion_ids):
        read.extend(zip(completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    table = make_prompt_table(model, [PromptExample("3+4=", {"answer": "7"})], max_prompt_length=8)
    names = ["exact_match", "soft_overlong(max_completion_length=3, cache=2)"]
    rewards = HostRewards(model, [reader, *load_host_rewards(model, names).functions])
    scores, metrics = rewards(table, np.arange(1), completions_of([[1]] * 2))
    assert read == [("", [1])] * 2
    np.testing.assert_array_equal(scores, [[0, 0, 0]] * 2)
    assert metrics["rewards/reader/mean"] == 0
