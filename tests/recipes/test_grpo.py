import dataclasses
import itertools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import generate, grpo
from jaxrl_llm.recipes.text.grpo import Config, make_grpo_iteration, make_update, rollout_metrics
from jaxrl_llm.recipes.text.language_model import load_model
from jaxrl_llm.recipes.text.prompts import Prompts
from jaxrl_llm.rollouts import Completions
from jaxrl_llm.training import init_train_state
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("compile_equal_programs_once")

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
def base(tmp_path_factory):
    """Prompts of several lengths over a vocabulary of four; the answer is always 7, and so says a column `completion`."""
    texts = ["".join(text) for size in range(1, 5) for text in itertools.product("7=", repeat=size)]
    folder = tmp_path_factory.mktemp("grpo")
    rows = [{"prompt": text, "answer": "7", "completion": "7", "number": len(text)} for text in texts]
    return Config(
        **TINY | {"tokenizer": "characters:7="},
        output_dir=str(folder / "run"),
        dataset=write_rows(folder / "prompts.jsonl", rows),
        eval_fraction=0.2,
        num_prompts=8,
        num_generations=8,
        max_completion_length=3,
        learning_rate=1e-2,
        warmup_steps=2,
        max_steps=8,
        logging_steps=1,
        eval_steps=4,
        save_steps=4,
    )


@pytest.fixture(scope="module")
def host_run(base):
    """Exact match on the host, with a reference; longer than the others."""
    config = dataclasses.replace(base, beta=0.05, max_steps=30, output_dir=base.output_dir + "_host")
    return config, grpo.run(config)


def test_a_run_raises_the_reward_and_leaves_everything_behind(host_run):
    config, figures = host_run
    lines = curve(config.output_dir)
    assert np.mean([line["reward"] for line in lines[1:4]]) < 0.3
    assert np.mean([line["reward"] for line in lines[-3:]]) > 0.7
    assert figures["eval_reward_before"] == lines[0]["eval_reward"] < 0.5
    assert figures["eval_reward"] == lines[-1]["eval_reward"] == 1
    assert_complete_folder(config.output_dir, steps=[28, 30])
    assert json.loads((open(f"{config.output_dir}/config.json")).read())["beta"] == 0.05


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
    assert (module.config.n_embd, len(tokenizer)) == (16, 4)
    assert generate.run(generate.Config(model=figures["model"], prompt=("77=",))) == ["7"]


def test_the_divergence_from_the_reference_starts_at_zero_and_grows(host_run):
    config, _ = host_run
    kl = [line["kl"] for line in curve(config.output_dir)[1:]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl[-5:]) > 0.1


def test_rewards_on_the_host_and_in_the_program_give_the_same_run(base):
    # The data has a column `completion`: it must not shadow what was sampled.
    host = dataclasses.replace(base, output_dir=base.output_dir + "_on_host")
    traced = dataclasses.replace(
        base,
        output_dir=base.output_dir + "_traced",
        reward_funcs=("jaxrl_llm.rewards:exact_match_tokens",),
        traceable_rewards=True,
    )
    figures = [grpo.run(config) for config in (host, traced)]
    assert figures[0]["eval_reward"] == figures[1]["eval_reward"]
    rewards = [[line["reward"] for line in curve(config.output_dir)[1:]] for config in (host, traced)]
    np.testing.assert_allclose(*rewards, atol=1e-6)
    assert 0 < rewards[0][0] < 0.5
    assert_close_weights(host.output_dir, traced.output_dir, atol=1e-6)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(base, monkeypatch, capsys):
    # β needs the model of the start, which is no part of the checkpoint; two updates an iteration need the old one.
    whole = dataclasses.replace(base, beta=0.1, num_iterations=2, max_steps=5, output_dir=base.output_dir + "_whole")
    grpo.run(whole)
    cut = dataclasses.replace(whole, output_dir=base.output_dir + "_cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=3)
        figures = grpo.run(cut)
    assert "model" not in figures
    assert "Stopped after step 3 of 5; --resume goes on from here." in capsys.readouterr().out
    grpo.run(dataclasses.replace(cut, resume=True))
    assert "Resumed with another option" not in capsys.readouterr().out
    assert_same_run(whole.output_dir, cut.output_dir)
    ratios = [line["clip_ratio/region_mean"] for line in curve(whole.output_dir)[1:]]
    assert max(ratios) > 0  # the second update of an iteration meets the clip


def test_several_rewards_are_weighted_and_may_not_apply(base, rewards):
    config = dataclasses.replace(
        base,
        output_dir=base.output_dir + "_several",
        reward_funcs=("jaxrl_llm.rewards:exact_match", *rewards("brief", "sevens", "never")),
        reward_weights=(1.0, 0.5, 0.25, 3.0),
        max_steps=2,
    )
    grpo.run(config)
    line = curve(config.output_dir)[1]
    assert line["rewards/never/mean"] == "NaN"
    parts = [line[f"rewards/{name}/mean"] for name in ("exact_match", "brief", "sevens")]
    # `sevens` applies to half of the rows, so that its mean counts half.
    np.testing.assert_allclose(line["reward"], parts[0] + 0.5 * parts[1] + 0.25 * parts[2] / 2, rtol=1e-5)
    assert line["rewards/sevens/mean"] > 0


def test_where_no_reward_ever_applies_nothing_is_learned_and_the_evaluation_says_so(base, rewards):
    config = dataclasses.replace(
        base, output_dir=base.output_dir + "_never", reward_funcs=rewards("never"), max_steps=3
    )
    figures = grpo.run(config)
    assert math.isnan(figures["eval_reward"])
    assert [line["grad_norm"] for line in curve(config.output_dir)[1:]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "traceable", "message"),
    [
        ("one_too_few", False, r"Reward 'one_too_few' returned 5 rewards for 6 completions"),
        ("not_a_number", False, r"Reward 'not_a_number' returned 'nan' for row 5; expected a finite number, or None"),
        ("needs_score", False, r"Reward 'needs_score' needs \['score'\]; there are .*'answer'.* Add the column"),
        ("traced_score", True, r"traceable reward '.*my_rewards.py:traced_score' needs \['score'\]; there are .*answer_ids"),
        ("traced_sum", True, r"traceable reward '.*:traced_sum' returned shape \(\); expected one number for each of the 6"),
        ("missing", False, r"my_rewards.py:missing' cannot be used: 'missing' is missing"),
    ],
)
def test_a_broken_reward_is_named(base, rewards, name, traceable, message):
    config = dataclasses.replace(
        base, reward_funcs=rewards(name), traceable_rewards=traceable, output_dir=base.output_dir + "_broken"
    )
    with pytest.raises(ValueError, match=message):
        grpo.run(config)


@pytest.fixture(scope="module")
def pieces(base):
    """A model, an optimizer, a state for each seed, prompts of two lengths and a reward on token ids."""
    config = dataclasses.replace(base, num_prompts=2, num_generations=4)
    model = load_model(config, jax.random.key(0))
    optimizer = optax.adam(1e-2)
    prompts = Prompts(jnp.array([[0, 3], [3, 2]]), jnp.array([[False, True], [True, True]]), {"wanted": jnp.array([2, 3])})

    def reward(completions, columns):
        return jnp.mean(completions.ids == columns["wanted"][:, None], axis=1)

    def iteration(config=config):
        return make_grpo_iteration(model.apply, model.head_kernel, optimizer, reward, config, eos_id=1, pad_id=0)

    def state(seed):
        return init_train_state(load_model(config, jax.random.key(seed)).params, optimizer)

    return config, model, optimizer, prompts, iteration, state


def test_an_iteration_is_compiled_once_and_vmapped_seeds_equal_separate_runs(pieces):
    _, _, _, prompts, iteration, state = pieces
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(iteration(), n=1))
    separate = []
    for seed in range(3):
        current, key = state(seed), jax.random.key(10 + seed)
        for _ in range(2):
            current, metrics, completions = step(current, prompts, key)
        separate.append((current, metrics, completions))
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(state, range(3)))
    keys = jax.vmap(jax.random.key)(jnp.arange(10, 13))
    together = jax.jit(jax.vmap(iteration(), in_axes=(0, None, 0)))
    for _ in range(2):
        states, metrics, completions = together(states, prompts, keys)
    separate = jax.tree.map(lambda *x: jnp.stack(x), *separate)
    np.testing.assert_array_equal(completions.ids, separate[2].ids)
    chex.assert_trees_all_close(metrics, separate[1], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(states.params, separate[0].params, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_groups_of_equal_rewards_give_no_gradient(pieces, scale_rewards):
    config, model, _, prompts, iteration, state = pieces
    config = dataclasses.replace(config, scale_rewards=scale_rewards)
    start = state(0)
    completions = jax.jit(iteration())(start, prompts, jax.random.key(1))[2]
    update = jax.jit(make_update(model.apply, model.head_kernel, optax.sgd(1.0), config))
    start = init_train_state(start.params, optax.sgd(1.0))
    rewards = jnp.repeat(jnp.array([1.0, 0.25]), 4)  # equal within each group, not between them
    end, metrics = update(start, None, prompts, completions, rewards, jax.random.key(2))
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] == 0
    chex.assert_trees_all_equal(end.params, start.params)


def test_rollout_metrics_by_hand():
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
    completions = Completions(
        ids=jnp.zeros((6, 3), jnp.int32),
        mask=mask,
        log_probs=jnp.where(mask, -1.0, 0),
        sampling_log_probs=jnp.where(mask, -0.75, 0).at[0, 0].set(0.0),
    )
    rewards = jnp.array([0.1, 0.1, 0.1, 1.0, 3.0, jnp.nan])
    metrics = rollout_metrics(completions, rewards, 3)
    expected = {
        "reward": (0.3 + 4) / 5,
        "reward_std": math.sqrt(2) / 2,  # mean of 0 and of the deviation of 1 and 3
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 13 / 6,
        "completions/min_length": 1,
        "completions/max_length": 3,
        "completions/clipped_ratio": 0.5,
        "sampling/sampling_logp_difference/mean": (1 + 12 * 0.25) / 13,
        "sampling/sampling_logp_difference/max": 1,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_an_evaluation_of_some_held_out_prompts_takes_them_from_everywhere(base):
    model = load_model(base, jax.random.key(0))
    everything = grpo._tables(model, base)[1]
    some = grpo._tables(model, dataclasses.replace(base, eval_prompts=3))[1]
    assert some.texts == [everything.texts[i] for i in (0, round((len(everything.texts) - 1) / 2), -1)]


def test_completions_that_the_model_has_no_room_for_are_refused(base):
    config = dataclasses.replace(base, max_completion_length=12)
    with pytest.raises(ValueError, match=r"n_positions=16 tokens, and 19 are needed: lower .*max_completion_length"):
        grpo.run(config)
