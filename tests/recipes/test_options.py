import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.recipes import quickstart
from jaxrl_llm.recipes.options import OptimizerOptions, require, require_at_least
from jaxrl_llm.recipes.text import cpo, distill, dpo, generate, grpo, kto, orpo, pretrain, sft
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
    (
        {"optim": "sgd", "optim_state_dtype": "bfloat16"},
        "optim_state_dtype must be float32 for sgd, which keeps no mean of gradients, got 'bfloat16'",
    ),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1, got 0"),
    ({"eval_fraction": 1.0}, "eval_fraction must be between 0 and 1, got 1.0"),
]
OFFLINE = [
    ({"max_length": 1}, "max_length must be a whole number of at least 2, got 1"),
    ({"max_steps": -1}, "max_steps must be a whole number of at least 0, got -1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number of at least 1, got 0"),
    ({"num_train_epochs": 0.0}, "num_train_epochs must be positive, got 0.0"),
    (
        {"gradient_accumulation_steps": 5, "per_device_train_batch_size": 8},
        "gradient_accumulation_steps must be a divisor of .*8.*, got 5",
    ),
]
SFT = [
    *OFFLINE,
    ({"early_stopping_patience": -1}, "early_stopping_patience must be a whole number of at least 0, got -1"),
    ({"num_samples": -1}, "num_samples must be a whole number of at least 0, got -1"),
    ({"sample_tokens": 0}, "sample_tokens must be a whole number of at least 1, got 0"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
    ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha must be at least 0, got -1.0"),
    ({"streaming": True}, "eval_dataset must be the source of the held-out rows where streaming is true, got ''"),
    *(
        ({"streaming": True, "eval_dataset": "rows.jsonl", name: True}, f"{name} must be false where streaming is true")
        for name in ("packing", "group_by_length")
    ),
]
REFERENCE = [
    ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0, 1\], got 0.0"),
    ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be a whole number of at least 1, got 0"),
    (
        {"precompute_ref_log_probs": True, "sync_ref_model": True},
        "precompute_ref_log_probs and sync_ref_model must be not both true: a reference that moves",
    ),
]
BETA = ({"beta": 0.0}, "beta must be positive, got 0.0")
SMOOTHING = ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5")
DPO = [
    *OFFLINE,
    *REFERENCE,
    BETA,
    SMOOTHING,
    ({"loss_type": ()}, r"loss_type must be at least one type, got \(\)"),
    ({"loss_weights": (1.0, 2.0)}, r"loss_weights must be one for each of \('sigmoid',\), got \(1.0, 2.0\)"),
    (
        {"loss_type": ("exo_pair",)},
        "label_smoothing must be above 0 for exo_pair, such as 1e-3, and below 0.5, got 0.0",
    ),
    ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
    (
        {"loss_type": ("aot",), "gradient_accumulation_steps": 2},
        "gradient_accumulation_steps must be 1 for aot and aot_unpaired, which sort the whole batch, got 2",
    ),
    ({"loss_type": ("aot_unpaired",), "use_weighting": True}, "use_weighting must be false for aot and aot_unpaired"),
    (
        {"loss_type": ("nca_pair",), "f_divergence_type": "js_divergence"},
        "must be reverse_kl for nca_pair, which has it",
    ),
    ({"loss_type": ("hinge",), "label_smoothing": 0.1}, r"label_smoothing must be 0: none of \('hinge',\) reads it"),
    *(
        (
            {"reference_free": True, name: True},
            "reference_free must be false with precompute_ref_log_probs and sync_ref",
        )
        for name in ("precompute_ref_log_probs", "sync_ref_model")
    ),
]
KTO = [
    *OFFLINE,
    *REFERENCE,
    BETA,
    ({"desirable_weight": 0.0}, "desirable_weight must be positive, got 0.0"),
    ({"undesirable_weight": -1.0}, "undesirable_weight must be positive, got -1.0"),
]
ORPO = [*OFFLINE, BETA]
CPO = [
    *OFFLINE,
    BETA,
    SMOOTHING,
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0: ipo does not read it, got 0.1"),
    ({"simpo_gamma": -1.0}, "simpo_gamma must be at least 0, got -1.0"),
    ({"cpo_alpha": -1.0}, "cpo_alpha must be at least 0, got -1.0"),
]
DISTILL = [
    *OFFLINE,
    ({"teacher": ""}, "teacher must be the folder or hub id of a model, got ''"),
    ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
]
PRETRAIN = [
    *OFFLINE,
    ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
    ({"tokenizer": "bpe:256"}, "tokenizer must be `bpe:` and the number of its tokens, at least 257, got 'bpe:256'"),
    ({"tokenizer": "bpe:many"}, "tokenizer must be `bpe:` and the number of its tokens, at least 257, got 'bpe:many'"),
]
GRPO = [
    ({"num_generations": 1}, "num_generations must be a whole number of at least 2, got 1"),
    ({"num_prompts": 0}, "num_prompts must be a whole number of at least 1, got 0"),
    ({"max_completion_length": 0}, "max_completion_length must be a whole number of at least 1, got 0"),
    ({"max_prompt_length": 0}, "max_prompt_length must be a whole number of at least 1, got 0"),
    ({"num_iterations": 0}, "num_iterations must be a whole number of at least 1, got 0"),
    ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
    ({"eval_prompts": 0}, "eval_prompts must be a whole number of at least 1, got 0"),
    (
        {"gradient_accumulation_steps": 3},
        "gradient_accumulation_steps must be a divisor of the 256 completions of an update, got 3",
    ),
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
    "kto": (kto, {"dataset": "labelled.jsonl"}, SHARED + KTO),
    "orpo": (orpo, {"dataset": "pairs.jsonl"}, SHARED + ORPO),
    "cpo": (cpo, {"dataset": "pairs.jsonl"}, SHARED + CPO),
    "distill": (distill, {"dataset": "rows.jsonl", "teacher": "a"}, SHARED + DISTILL),
    "pretrain": (pretrain, {"dataset": "text.txt"}, SHARED + PRETRAIN),
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


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "generate"])
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
