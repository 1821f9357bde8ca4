import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.losses import mask_truncated_completions
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import generate, grpo
from jaxrl_llm.recipes.text.experience import Policy, rollout_metrics
from jaxrl_llm.recipes.text.grpo import Config, make_grpo_iteration, make_method
from jaxrl_llm.recipes.text.iteration import start_state
from jaxrl_llm.recipes.text.language_model import load_model
from jaxrl_llm.recipes.text.online import load_parts
from jaxrl_llm.recipes.text.prompts import Prompts
from jaxrl_llm.rollouts import Completions
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    write_rows,
)
from tests.unchecked import unchecked

REWARDS = '''
import jax.numpy as jnp

def brief(completions, **columns):
    return [-float(len(text)) for text in completions]

def sevens(prompts, completions):
    """Does not apply to every other row."""
    return [None if i % 2 else float(text.count("7")) for i, text in enumerate(completions)]

def never(completions, **columns):
    return [None] * len(completions)

def one_too_few(completions, **columns):
    return [0.0] * (len(completions) - 1)

def not_a_number(completions, **columns):
    return [0.0] * (len(completions) - 1) + [float("nan")]

def needs_score(completions, score):
    return score

def traced_score(completion_ids, score):
    return jnp.zeros(completion_ids.shape[0])

def traced_sum(completion_ids, completion_mask):
    return jnp.sum(completion_mask)
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(REWARDS)
    return lambda *names: tuple(f"{path}:{name}" for name in names)


@pytest.fixture(scope="module")
def base(tuned, tmp_path_factory):
    """The answer to every sum is 7, and so says a column `completion`."""
    folder = tmp_path_factory.mktemp("grpo")
    rows = [
        {"prompt": f"{a}+{b}=", "answer": "7", "completion": "7", "sum": a + b} for a in range(10) for b in range(3)
    ]
    return Config(
        output_dir=str(folder / "host"),
        model=tuned[1]["model"],
        dataset=write_rows(folder / "prompts.jsonl", rows),
        eval_fraction=0.2,
        num_prompts=8,
        num_generations=8,
        max_completion_length=3,
        num_iterations=2,
        beta=0.02,
        learning_rate=1e-2,
        adam_epsilon=1e-4,
        warmup_steps=2,
        seed=1,
        max_steps=12,
        logging_steps=1,
        eval_steps=4,
        save_steps=4,
    )


@pytest.fixture(scope="module")
def host_run(base):
    """Exact match, on the host."""
    return base, grpo.run(base)


def renamed(config, name, **changes):
    """The same settings in a folder of their own."""
    return dataclasses.replace(config, output_dir=config.output_dir.replace("/host", f"/{name}"), **changes)


def test_a_run_raises_the_reward_and_leaves_everything_behind(host_run):
    config, figures = host_run
    lines = curve(config.output_dir)
    assert lines[1]["reward"] < 0.2
    assert lines[-1]["reward"] > 0.9
    assert figures["eval_reward_before"] == lines[0]["eval_reward"] == 0
    assert figures["eval_reward"] == lines[-1]["eval_reward"] == 1
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 4, 8, 12]
    assert_complete_folder(config.output_dir, steps=[8, 12])


def test_metrics_have_the_names_of_trl(host_run):
    config, _ = host_run
    assert set(curve(config.output_dir)[1]) >= {
        "loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/exact_match/mean",
        "rewards/exact_match/std",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_mean",
        "clip_ratio/high_max",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "learning_rate",
        "grad_norm",
    }


def test_the_saved_model_loads_and_says_what_was_rewarded(host_run):
    _, figures = host_run
    module, _, tokenizer = from_pretrained(figures["model"])
    assert (module.config.n_embd, len(tokenizer)) == (16, 14)
    assert generate.run(generate.Config(model=figures["model"], prompt=("3+2=",))) == ["7"]


def test_the_divergence_from_the_model_of_the_start_begins_at_zero_and_grows(host_run):
    config, _ = host_run
    # The first learning rate of a warm-up is 0, so that both updates of the first iteration see the reference itself.
    kl = [line["kl"] for line in curve(config.output_dir)[1:]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert min(kl[-5:]) > 0.1


def test_updates_on_the_same_completions_meet_the_clip(host_run):
    config, _ = host_run
    clipped = [line["clip_ratio/region_mean"] for line in curve(config.output_dir)[1:]]
    assert clipped[0] == 0
    assert 0 < max(clipped) < 1


def test_rewards_on_the_host_and_in_the_program_give_the_same_run(host_run):
    # The data has a column `completion`: it must not shadow what was sampled.
    # Few steps: a policy that depends on its samples makes much of the rounding in which the two programs differ.
    few = dataclasses.replace(host_run[0], max_steps=6)
    reward = ("jaxrl_llm.rewards:exact_match_tokens",)
    host, traced = renamed(few, "few"), renamed(few, "traced", reward_funcs=reward, traceable_rewards=True)
    figures, traced_figures = grpo.run(host), grpo.run(traced)
    assert traced_figures["eval_reward"] == figures["eval_reward"] > figures["eval_reward_before"]
    for name in ("reward", "reward_std", "loss"):
        values = [[line[name] for line in curve(config.output_dir)[1:]] for config in (host, traced)]
        np.testing.assert_allclose(*values, atol=1e-6, err_msg=name)
    assert_close_weights(host.output_dir, traced.output_dir, atol=1e-6)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(host_run, monkeypatch, capsys):
    # The reference is the model of the start, which is no part of the checkpoint.
    whole, _ = host_run
    cut = renamed(whole, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=7)
        figures = grpo.run(cut)
    assert "model" not in figures
    assert "Stopped after step 7 of 12; --resume goes on from here." in capsys.readouterr().out
    grpo.run(dataclasses.replace(cut, resume=True))
    assert "Resumed with another option" not in capsys.readouterr().out
    assert_same_run(whole.output_dir, cut.output_dir)


def test_several_rewards_are_weighted_and_may_not_apply(base, rewards):
    functions = ("jaxrl_llm.rewards:exact_match", *rewards("brief", "sevens", "never"))
    config = renamed(base, "several", reward_funcs=functions, reward_weights=(1.0, 0.5, 0.25, 3.0), max_steps=2)
    grpo.run(config)
    line = curve(config.output_dir)[1]
    assert line["rewards/never/mean"] == "NaN"
    parts = [line[f"rewards/{name}/mean"] for name in ("exact_match", "brief", "sevens")]
    assert min(map(abs, parts)) > 0
    # `sevens` applies to half of the rows, so its mean counts half.
    np.testing.assert_allclose(line["reward"], parts[0] + 0.5 * parts[1] + 0.25 * parts[2] / 2, rtol=1e-5)


def test_where_no_reward_ever_applies_nothing_pulls_and_the_evaluation_says_so(base, rewards):
    config = renamed(base, "never", reward_funcs=rewards("never"), max_steps=3)
    figures = grpo.run(config)
    assert math.isnan(figures["eval_reward"])
    lines = curve(config.output_dir)
    assert lines[0]["eval_reward"] == "NaN"
    assert [line["grad_norm"] for line in lines[1:]] == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "traceable", "message"),
    [
        ("one_too_few", False, r"Reward 'one_too_few' returned 5 rewards for 6 completions"),
        ("not_a_number", False, r"Reward 'not_a_number' returned 'nan' for row 5; expected a finite number, or None"),
        ("needs_score", False, r"Reward 'needs_score' needs \['score'\]; there are .*'answer'.* Add the column"),
        (
            "traced_score",
            True,
            r"traceable reward '.*my_rewards.py:traced_score' needs \['score'\]; there are .*answer_ids",
        ),
        (
            "traced_sum",
            True,
            r"traceable reward '.*:traced_sum' returned shape \(\); expected one number for each of the 6",
        ),
        ("missing", False, r"my_rewards.py:missing' cannot be used: 'missing' is missing"),
    ],
)
def test_a_broken_reward_is_named(base, rewards, name, traceable, message):
    config = renamed(base, "broken", reward_funcs=rewards(name), traceable_rewards=traceable)
    with pytest.raises(ValueError, match=message):
        grpo.run(config)


class Pieces(NamedTuple):
    """What a program of one's own is made of."""

    iteration: Callable
    start: Callable
    prompts: Prompts


def policy_of(model):
    return Policy(model.apply, model.head_kernel)


@pytest.fixture(scope="module")
def pieces():
    config = Config(**TINY, num_prompts=2, num_generations=4, max_completion_length=3)
    optimizer = optax.sgd(0.1)
    model = load_model(config, jax.random.key(0))

    def reward(completions, columns):
        return columns["weight"] * jnp.mean(completions.ids == columns["wanted"][:, None], axis=1)

    def start(seed):
        params = load_model(config, jax.random.key(seed)).params
        return start_state(make_method(config), params, optimizer)

    iteration = make_grpo_iteration(policy_of(model), optimizer, reward, config, eos_ids=(1,), pad_id=0)
    columns = {"wanted": jnp.array([2, 3]), "weight": jnp.array([1.0, 2.0])}
    return Pieces(
        iteration, start, Prompts(jnp.array([[0, 3], [3, 2]]), jnp.array([[False, True], [True, True]]), columns)
    )


@pytest.fixture(scope="module")
def compiled_iteration(pieces):
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(pieces.iteration, n=1))


def test_an_iteration_is_traced_once_and_vmapped_seeds_equal_separate_runs(pieces, compiled_iteration):
    separate = []
    for seed in range(3):
        state, key = pieces.start(seed), jax.random.key(10 + seed)
        for _ in range(2):
            state, metrics, rollout = compiled_iteration(state, pieces.prompts, key)
        separate.append((state.train.params, metrics, rollout))
    params, metrics, rollouts = jax.tree.map(lambda *x: jnp.stack(x), *separate)
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(pieces.start, range(3)))
    keys = jax.vmap(jax.random.key)(jnp.arange(10, 13))
    together = jax.jit(jax.vmap(pieces.iteration, in_axes=(0, None, 0)))
    for _ in range(2):
        states, vmapped_metrics, vmapped_rollouts = together(states, pieces.prompts, keys)
    assert (vmapped_metrics["frac_reward_zero_std"] < 1).any()
    np.testing.assert_array_equal(vmapped_rollouts.completions.ids, rollouts.completions.ids)
    chex.assert_trees_all_close(vmapped_metrics, metrics, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(states.train.params, params, rtol=0, atol=1e-6)


def test_groups_of_equal_rewards_give_no_gradient(pieces, compiled_iteration):
    start = pieces.start(0)
    prompts = pieces.prompts._replace(columns=pieces.prompts.columns | {"weight": jnp.zeros(2)})
    end, metrics, _ = compiled_iteration(start, prompts, jax.random.key(1))
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(end.train.params, start.train.params)


def test_epsilon_and_beta_may_be_traced(pieces):
    config = Config(**TINY, num_prompts=2, num_generations=4, max_completion_length=3)
    model = load_model(config, jax.random.key(0))

    def reward(completions, columns):
        return jnp.mean(completions.ids == columns["wanted"][:, None], axis=1)

    def iteration(epsilon, beta):
        traced = dataclasses.replace(config, epsilon=epsilon, beta=beta)
        made = make_grpo_iteration(policy_of(model), optax.sgd(0.1), reward, traced, eos_ids=(1,), pad_id=0)
        return made(pieces.start(0), pieces.prompts, jax.random.key(0), model.params)[1]["kl"]

    with unchecked():  # the types of the settings are those of the command line
        assert jax.eval_shape(jax.vmap(iteration), jnp.array([0.1, 0.2]), jnp.array([0.0, 0.1])).shape == (2,)


def completions_of(ids, mask):
    zeros = jnp.zeros(mask.shape)
    return Completions(ids, mask, zeros, zeros)


def test_rollout_metrics_by_hand():
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
    ids = jnp.array([[5, 5, 5], [1, 0, 0], [5, 2, 0], [5, 5, 1], [1, 1, 5], [2, 0, 0]])
    completions = completions_of(ids, mask)
    ended = mask_truncated_completions(ids, mask, jnp.array([1, 2])).any(-1)
    assert ended.tolist() == [False, True, True, True, False, True]
    rewards = jnp.array([0.1, 0.1, 0.1, 1.0, 3.0, jnp.nan])
    metrics = jax.jit(rollout_metrics, static_argnums=2)(completions, rewards, 3, ended)
    expected = {
        "reward": (0.3 + 4) / 5,
        "reward_std": math.sqrt(2) / 2,  # mean of 0 and of the deviation of 1 and 3
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 13 / 6,
        "completions/min_length": 1,
        "completions/max_length": 3,
        "completions/clipped_ratio": 1 / 3,
        "completions/mean_terminated_length": 7 / 4,
        "completions/min_terminated_length": 1,
        "completions/max_terminated_length": 3,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_equal_rewards_have_no_deviation_whatever_they_are():
    # Their mean is rounded, so that a computed deviation may be a rounding error.
    completions = completions_of(jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1), bool))
    rewards = jnp.array([[value] * 8 for value in (0.1, 0.3, 0.7, -2.2, 123.4)])
    measure = jax.jit(jax.vmap(rollout_metrics, in_axes=(None, 0, None, None)), static_argnums=2)
    np.testing.assert_array_equal(measure(completions, rewards, 8, jnp.ones(8, bool))["frac_reward_zero_std"], 1)


def test_an_evaluation_of_some_held_out_prompts_takes_them_from_everywhere(base):
    everything = load_parts(base, jax.random.key(0)).held_out.texts
    some = load_parts(dataclasses.replace(base, eval_prompts=3), jax.random.key(0)).held_out.texts
    assert len(everything) == 6
    assert some == [everything[i] for i in (0, 2, 5)]


def test_completions_that_the_model_has_no_room_for_are_refused(base):
    with pytest.raises(ValueError, match=r"context_length=16 tokens, and 17 are needed: lower .*max_completion_length"):
        grpo.run(renamed(base, "long", max_completion_length=14))
