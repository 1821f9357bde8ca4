import dataclasses
import functools
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import grpo, ppo, reinforce, rloo, trpo
from jaxrl_llm.recipes.text.experience import Policy, Rollout
from jaxrl_llm.recipes.text.iteration import as_rollout, make_iteration, make_sampler, make_update, start_state
from jaxrl_llm.recipes.text.language_model import load_model
from jaxrl_llm.recipes.text.prompts import Prompts
from jaxrl_llm.rollouts import Completions
from tests.recipes.runs import TINY, assert_same_run, curve, press_ctrl_c_after, write_rows
from tests.unchecked import unchecked

RECIPES = {"grpo": grpo, "rloo": rloo, "reinforce": reinforce, "ppo": ppo, "trpo": trpo}


@pytest.fixture(scope="module")
def settings(tuned, tmp_path_factory):
    """The answer to every sum is 7."""
    folder = tmp_path_factory.mktemp("online")
    rows = [{"prompt": f"{a}+{b}=", "answer": "7"} for a in range(10) for b in range(3)]
    return {
        "model": tuned[1]["model"],
        "dataset": write_rows(folder / "prompts.jsonl", rows),
        "eval_fraction": 0.2,
        "num_prompts": 8,
        "num_generations": 8,
        "max_completion_length": 3,
        "max_steps": 16,
        "logging_steps": 1,
        "eval_steps": 8,
        "save_steps": 8,
    }


def config_of(name, settings, folder, **changes):
    learned = {"learning_rate": 1e-2, "adam_epsilon": 1e-4, "warmup_steps": 2}
    own = {
        "grpo": {},
        "rloo": {"beta": 0.01, "num_minibatches": 2},
        "reinforce": {"kl_coef": 0.01},
        "ppo": {"num_iterations": 2, "num_minibatches": 2, "value_network": "shared", "target_kl": 6.0},
        "trpo": {"max_kl": 0.1, "max_steps": 24},
    }[name]
    learned = {} if name == "trpo" else learned
    output = {"output_dir": str(folder / name)}
    return RECIPES[name].Config(**settings | output | learned | own | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "name", ["rloo", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reinforce", "trpo"))]
)
def test_each_method_learns_and_leaves_a_model(name, settings, folder):
    config = config_of(name, settings, folder)
    figures = RECIPES[name].run(config)
    lines = curve(config.output_dir)
    assert figures["eval_reward_before"] < 0.3
    assert figures["eval_reward"] == 1, [line.get("reward") for line in lines]
    assert lines[1]["sampling/sampling_logp_difference/max"] < 1e-4
    read = [config.num_prompts * config.num_generations * (4 + line["completions/mean_length"]) for line in lines[1:]]
    assert [line["num_tokens"] for line in lines[1:]] == pytest.approx(np.cumsum(read), rel=1e-6)  # prompts have 4
    _, params, _ = from_pretrained(figures["model"])
    assert jax.tree.structure(params) == jax.tree.structure(load_model(config, jax.random.key(0)).params)
    rows = [json.loads(line) for line in Path(config.output_dir, "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(8, config.max_steps + 1, 8))
    assert set(rows[0]) == {"step", "prompt", "completion", "reward"}
    assert all(row["reward"] == float(row["completion"] == "7") for row in rows)
    if name == "trpo":
        assert max(line["trpo/kl"] for line in lines[1:]) <= config.max_kl
        assert max(line["trpo/kl"] for line in lines[1:]) > 0.5 * config.max_kl
    if name == "ppo":
        assert {
            "objective/kl",
            "objective/entropy",
            "objective/scores",
            "objective/rlhf_reward",
            "loss/value_avg",
        } <= set(lines[1])
        assert lines[1]["objective/kl_coef"] != lines[-1]["objective/kl_coef"]


@pytest.mark.parametrize("name", ["grpo", pytest.param("trpo", marks=pytest.mark.slow)])
def test_adapters_alone_learn_over_a_base_that_stays(name, settings, folder):
    changes = {"lora": True, "target_modules": ("all-linear",), "output_dir": str(folder / f"lora-{name}")}
    changes |= {"max_kl": 0.3, "max_steps": 40} if name == "trpo" else {"learning_rate": 3e-2, "beta": 0.02, "seed": 1}
    config = config_of(name, settings, folder, **changes)
    figures = RECIPES[name].run(config)
    lines = curve(config.output_dir)
    assert figures["eval_reward_before"] < 0.3
    assert figures["eval_reward"] == 1, [line.get("eval_reward") for line in lines]
    if name == "trpo":
        assert 0 < max(line["trpo/kl"] for line in lines[1:]) <= config.max_kl
    if name == "grpo":  # The reference is the base without adapters.
        assert lines[1]["kl"] == pytest.approx(0, abs=1e-6)
        assert lines[-1]["kl"] > 0.1
    base, merged = (from_pretrained(path)[1] for path in (config.model, figures["model"]))
    np.testing.assert_array_equal(base["token_embedding"]["embedding"], merged["token_embedding"]["embedding"])
    assert Path(config.output_dir, "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_ppo_stopped_by_ctrl_c_resumes_bit_for_bit(settings, folder, monkeypatch):
    whole = config_of(
        "ppo", settings, folder, output_dir=str(folder / "whole"), max_steps=6, save_steps=2, eval_steps=3
    )
    ppo.run(whole)
    cut = dataclasses.replace(whole, output_dir=str(folder / "cut"))
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=3)
        ppo.run(cut)
    ppo.run(dataclasses.replace(cut, resume=True))
    assert_same_run(whole.output_dir, cut.output_dir)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("trpo", {"num_iterations": 2}, "num_iterations must be 1: the trust region"),
        (
            "grpo",
            {"traceable_rewards": True, "reward_timeout": 1.0},
            "reward_timeout and reward_errors must be 0 and raise",
        ),
        ("grpo", {"drop_zero_std_groups": True, "loss_type": "grpo"}, "drop_zero_std_groups must be false but with"),
        ("grpo", {"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive"),
        ("reinforce", {"num_iterations": 2}, "num_iterations must be 1: without a ratio"),
        ("ppo", {"value_model": "x"}, "value_model must be empty where value_network is shared"),
        ("ppo", {"kl_estimator": "k2"}, "kl_estimator must be k1 or k3 in a reward"),
        ("ppo", {"kl_coef": 0.0}, "kl_coef must be positive to be adapted"),
        ("rloo", {"num_minibatches": 7}, "num_minibatches must be a divisor of the 64 completions"),
        ("rloo", {"rollout_batch_size": 3}, "rollout_batch_size must be a divisor of num_prompts=8"),
        ("rloo", {"gradient_accumulation_steps": 3}, "gradient_accumulation_steps must be a divisor of the 32"),
        ("grpo", {"loss_type": "luspo"}, "importance_sampling_level must be sequence for luspo"),
        ("grpo", {"loss_type": "cispo"}, "epsilon_high must be the largest ratio itself for cispo"),
        ("grpo", {"kl_estimator": "k1"}, "kl_estimator must be k2 or k3"),
        ("grpo", {"dropout": 0.1}, "dropout and lora_dropout must be 0: completions are scored as they were sampled"),
        (
            "grpo",
            {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps must be 1",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(name, changes, message, settings, folder):
    with pytest.raises(ValueError, match=message):
        RECIPES[name].run(config_of(name, settings, folder, **changes))


@functools.cache
def tiny_policy():
    model = load_model(grpo.Config(**TINY), jax.random.key(0))
    return model, Policy(model.apply, model.head_kernel)


PROMPTS = Prompts(jnp.array([[0, 3], [3, 2], [4, 5], [0, 6]]), jnp.array([[0, 1], [1, 1], [1, 1], [0, 1]]) == 1, {})


def test_how_many_prompts_are_sampled_at_once_changes_no_sample():
    model, policy = tiny_policy()
    config = grpo.Config(**TINY, num_generations=3, max_completion_length=4)
    samples = [
        jax.jit(make_sampler(policy, dataclasses.replace(config, rollout_batch_size=size), eos_ids=(1,), pad_id=0))(
            model.params, jax.random.key(1), PROMPTS
        )
        for size in (0, 2)
    ]
    np.testing.assert_array_equal(samples[0].ids, samples[1].ids)
    chex.assert_trees_all_close(samples[0], samples[1], atol=1e-5)


VARIANTS = [
    ("grpo", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    ("grpo", {"loss_type": "sapo", "scale_rewards": "batch", "mask_truncated_completions": True}),
    pytest.param(
        "grpo", {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.5}, marks=pytest.mark.slow
    ),
    (
        "grpo",
        {"loss_type": "vespo", "drop_zero_std_groups": True, "off_policy_mask_threshold": 0.1, "num_minibatches": 2},
    ),
    ("grpo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    pytest.param(
        "grpo", {"loss_type": "gmpo", "multi_objective_aggregation": "normalize_then_sum"}, marks=pytest.mark.slow
    ),
    ("grpo", {"top_p": 0.8, "importance_sampling_mode": "token_truncate", "use_adaptive_entropy": True}),
    pytest.param(
        "reinforce", {"baseline": "none", "normalize_advantages": True, "kl_coef": 0.1}, marks=pytest.mark.slow
    ),
    ("reinforce", {"baseline": "group", "gamma": 0.9}),
    ("rloo", {"beta": 0.1, "normalize_advantages": True}),
    ("ppo", {"whiten_rewards": True, "missing_eos_penalty": 1.0, "num_iterations": 2}),
    pytest.param(
        "ppo", {"value_network": "shared", "kl_estimator": "k3", "num_minibatches": 2}, marks=pytest.mark.slow
    ),
    ("trpo", {"loss_type": "grpo"}),
]


def two_rewards(completions, columns):
    sevens = jnp.sum((completions.ids == 7) & completions.mask, axis=1)
    return jnp.stack([sevens, jnp.where(completions.mask[:, -1], jnp.nan, 0.5)], axis=1).astype(jnp.float32)


@functools.cache
def sampled_rollout():
    """Completions of the tiny policy from its likelier tokens, with two rewards."""
    model, policy = tiny_policy()
    config = grpo.Config(**TINY, num_prompts=4, num_generations=4, max_completion_length=4, top_p=0.8)
    sample = jax.jit(make_sampler(policy, config, eos_ids=(1,), pad_id=0))
    completions = sample(model.params, jax.random.key(3), PROMPTS)
    return as_rollout(PROMPTS, completions, two_rewards(completions, {}), config.num_generations)


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value
)
def test_every_variant_is_one_pure_update_and_moves_the_policy(name, options):
    model, policy = tiny_policy()
    recipe = RECIPES[name]
    config = recipe.Config(**TINY, **{"num_prompts": 4, "num_generations": 4, "max_completion_length": 4, **options})
    recipe.validate(config)
    method = recipe.make_method(model, config) if name == "ppo" else recipe.make_method(config)
    optimizer = trpo.make_optimizer(config) if name == "trpo" else optax.sgd(0.1)
    update = make_update(policy, optimizer, method, config, eos_ids=(1,))
    start = start_state(method, method.start(jax.random.key(2), model.params), optimizer)
    state, metrics = jax.jit(update)(start, model.params, sampled_rollout(), jax.random.key(3))
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["grad_norm"] > 0
    moved = optax.tree.norm(optax.tree.sub(method.policy_params(state.train.params), model.params))
    assert 0 < moved < 10
    assert state.train.step == config.updates_per_step


def test_the_ratio_of_the_first_update_is_exactly_one():
    model, policy = tiny_policy()
    config = ppo.Config(
        **TINY, num_prompts=4, num_generations=4, max_completion_length=4, num_iterations=1, value_network="shared"
    )
    method = ppo.make_method(model, config)
    iteration = make_iteration(policy, optax.sgd(0.0), method, two_rewards, config, eos_ids=(1,), pad_id=0)
    start = start_state(method, method.start(jax.random.key(2), model.params), optax.sgd(0.0))
    metrics = jax.jit(iteration)(start, PROMPTS, jax.random.key(3), model.params)[1]
    assert metrics["policy/approxkl_avg"] == 0
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)  # a sum of weights that are rounded
    assert metrics["policy/clipfrac_avg"] == 0


def test_rewards_add_up_by_their_weights_where_they_apply():
    completions = Completions(*[jnp.zeros((3, 1))] * 4)
    rewards = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [jnp.nan, jnp.nan]])
    with unchecked():
        rollout = Rollout(jnp.zeros((3, 1)), jnp.ones((3, 1)), completions, rewards)
        np.testing.assert_array_equal(rollout.total_rewards((2.0, 0.5)), [3.0, 1.5, np.nan])
        np.testing.assert_array_equal(rollout.total_rewards(), [3.0, 3.0, np.nan])
