import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.recipes import quickstart
from jaxrl_llm.recipes.options import OptimizerOptions, require, require_at_least
from jaxrl_llm.recipes.text import dpo, generate, grpo, sft
from tests.unchecked import unchecked

SHARED = [
    ({"output_dir": ""}, "output_dir must be the name of a folder, got ''"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"logging_steps": 0}, "logging_steps must be a whole number of at least 1, got 0"),
    ({"eval_steps": 0}, "eval_steps must be a whole number of at least 1, got 0"),
    ({"save_steps": 0}, "save_steps must be a whole number of at least 1, got 0"),
    ({"save_total_limit": 0}, "save_total_limit must be a whole number of at least 1, got 0"),
    ({"resume": True, "overwrite": True}, r"resume and overwrite must be not both true, got \(True, True\)"),
    ({"n_layer": 0}, "n_layer must be a whole number of at least 1, got 0"),
    ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
    ({"initializer_range": 0.0}, "initializer_range must be positive, got 0.0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\), got 1.0"),
    ({"adam_beta2": -0.1}, r"adam_beta2 must be in \[0, 1\), got -0.1"),
    ({"adam_epsilon": 0.0}, "adam_epsilon must be positive, got 0.0"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0"),
    ({"eval_fraction": 1.0}, "eval_fraction must be between 0 and 1, got 1.0"),
]
SFT = [
    ({"max_length": 1}, "max_length must be a whole number of at least 2, got 1"),
    ({"max_steps": -1}, "max_steps must be a whole number of at least 0, got -1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number of at least 1, got 0"),
    ({"num_train_epochs": 0.0}, "num_train_epochs must be positive, got 0.0"),
    (
        {"gradient_accumulation_steps": 5, "per_device_train_batch_size": 8},
        "gradient_accumulation_steps must be a divisor of .*8.*, got 5",
    ),
]
DPO = [
    *SFT,
    ({"beta": 0.0}, "beta must be positive, got 0.0"),
    ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
]
GRPO = [
    ({"num_generations": 1}, "num_generations must be a whole number of at least 2, got 1"),
    ({"num_prompts": 0}, "num_prompts must be a whole number of at least 1, got 0"),
    ({"max_completion_length": 0}, "max_completion_length must be a whole number of at least 1, got 0"),
    ({"max_prompt_length": 0}, "max_prompt_length must be a whole number of at least 1, got 0"),
    ({"num_iterations": 0}, "num_iterations must be a whole number of at least 1, got 0"),
    ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
    ({"eval_prompts": 0}, "eval_prompts must be a whole number of at least 1, got 0"),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps must be a divisor of the 256 completions, got 3"),
    ({"temperature": 0.0}, "temperature must be positive: greedy completions are all alike, got 0.0"),
    ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
    ({"epsilon_high": 0.0}, "epsilon_high must be positive or None, got 0.0"),
    ({"delta": -1.0}, "delta must be positive or None, got -1.0"),
    ({"epsilon": 1.0}, r"epsilon must be in \(0, 1\), got 1.0"),
    ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
    ({"reward_funcs": ()}, r"reward_funcs must be at least one function, got \(\)"),
    ({"reward_weights": (1.0, 2.0)}, r"reward_weights must be 1 numbers or none, got \(1.0, 2.0\)"),
]
QUICKSTART = [
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"sft_steps": 1}, "sft_steps must be a whole number of at least 2, got 1"),
    ({"grpo_steps": 1}, "grpo_steps must be a whole number of at least 2, got 1"),
    ({"ppo_timesteps": 100}, "ppo_timesteps must be at least 2048, one step of the run, got 100"),
]
GENERATE = [
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    ({"num_generations": 0}, "num_generations must be a whole number of at least 1, got 0"),
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ({"prompt": ("a", "")}, r"prompt must be at least one text, none of them empty, got \('a', ''\)"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
]
RECIPES = {
    "sft": (sft, {}, SHARED + SFT),
    "dpo": (dpo, {"dataset": "pairs.jsonl"}, SHARED + DPO),
    "grpo": (grpo, {}, SHARED + GRPO),
    "quickstart": (quickstart, {}, QUICKSTART),
    "generate": (generate, {"model": "a", "prompt": ("b",)}, GENERATE),
}
CASES = [(name, *case) for name, (_, _, cases) in RECIPES.items() for case in cases]


@pytest.mark.parametrize(("recipe", "settings", "message"), CASES)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_loaded(recipe, settings, message):
    module, needed, _ = RECIPES[recipe]
    with pytest.raises(ValueError, match=message):
        module.run(module.Config(**needed | settings))


@pytest.mark.parametrize("recipe", ["sft", "dpo", "grpo", "quickstart"])
def test_the_defaults_are_valid(recipe):
    module, needed, _ = RECIPES[recipe]
    module.validate(module.Config(**needed))


def test_a_warm_up_as_long_as_the_run_is_refused_unless_the_rate_then_stays():
    options = OptimizerOptions(learning_rate=0.5, warmup_steps=10)
    with pytest.raises(ValueError, match="warmup_steps must be less than 10, the steps of the run, got 10"):
        options.schedule(10)
    schedule = OptimizerOptions(learning_rate=0.5, warmup_steps=10, lr_scheduler_type="constant").schedule(10)
    assert [float(schedule(step)) for step in (0, 5, 10, 99)] == [0, 0.25, 0.5, 0.5]


def test_the_optimizer_is_made_from_the_options():
    options = OptimizerOptions(
        learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.5
    )
    optimizer = options.optimizer(total_steps=1)
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, -4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.3, 0.4], rtol=1e-5)  # clipped to a norm of 0.5


def test_require_says_what_came_and_what_was_meant():
    require("rate", 0.5, "positive", lambda rate: rate > 0)
    with pytest.raises(ValueError, match=r"^rate must be positive, got -1\.$"):
        require("rate", -1, "positive", lambda rate: rate > 0)
    require_at_least(1, count=1)
    with unchecked(), pytest.raises(ValueError, match=r"^count must be a whole number of at least 1, got 1.5\.$"):
        require_at_least(1, count=1.5)
