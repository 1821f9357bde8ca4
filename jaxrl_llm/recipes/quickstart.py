"""The main job in five minutes on two CPU cores: everything that this library does, once, small and for real.

    jaxrl-llm quickstart

1. SFT: a new two-layer GPT-2 with a character tokenizer learns sums of three one-digit numbers from right answers.
2. GRPO: the same model gets better by itself; it sees only whether its answers are right.
3. PPO: a policy learns to balance CartPole-v1, with the same loss that serves language.

Everything is written to `runs/quickstart/`: metrics, plots, the models, and `report.html`, which tells what happened.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.data import prompt_example, split_indices, tokenize_prompt
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.recipes.options import ModelOptions, require, require_at_least
from jaxrl_llm.recipes.progress import table
from jaxrl_llm.recipes.report import ReportTable, Section, plot_metrics, write_report
from jaxrl_llm.recipes.text import grpo, sft
from jaxrl_llm.recipes.text.language_model import SUMS_TOKENIZER, complete, load_model, load_rows
from jaxrl_llm.training.logging import read_metrics

HELD_OUT = 0.128
"""Share of the 4,000 sums that nothing is trained on: 512."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the quickstart; the defaults are the ones that the README's figures were made with."""

    output_dir: str = "runs/quickstart"
    """Folder for everything that is written; what an earlier quickstart left there is replaced."""
    seed: int = 0
    """Seed of all three runs."""
    sft_steps: int = 300
    """Steps of supervised fine-tuning, on 64 right answers each."""
    grpo_steps: int = 300
    """Iterations of GRPO, on 64 prompts with 8 completions each."""
    ppo_timesteps: int = 500_000
    """Environment steps of PPO."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    require_at_least(0, seed=config.seed)
    require_at_least(2, sft_steps=config.sft_steps, grpo_steps=config.grpo_steps)
    require("ppo_timesteps", config.ppo_timesteps, "at least 2048, one step of the run", lambda n: n >= 2048)


def sft_config(config: Config) -> sft.Config:
    """Settings of the first run."""
    return sft.Config(
        output_dir=f"{config.output_dir}/sft",
        overwrite=True,
        seed=config.seed,
        dataset="sums",
        tokenizer=SUMS_TOKENIZER,
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_positions=16,
        initializer_range=0.1,
        eval_fraction=HELD_OUT,
        eval_exact_match=True,
        max_steps=config.sft_steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=min(50, config.sft_steps - 1),
        eval_steps=50,
        save_steps=1000,
    )


def grpo_config(config: Config, model: str) -> grpo.Config:
    """Settings of the second run, which starts from the model of the first."""
    return grpo.Config(
        output_dir=f"{config.output_dir}/grpo",
        overwrite=True,
        seed=config.seed,
        model=model,
        dataset="sums",
        eval_fraction=HELD_OUT,
        reward_funcs=("jaxrl_llm.rewards:exact_match_tokens",),
        traceable_rewards=True,
        num_prompts=64,
        num_generations=8,
        max_completion_length=4,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=min(30, config.grpo_steps - 1),
        max_steps=config.grpo_steps,
        logging_steps=5,
        eval_steps=50,
        save_steps=1000,
    )


def ppo_config(config: Config) -> ppo.Config:
    """Settings of the third run."""
    return ppo.Config(
        output_dir=f"{config.output_dir}/ppo",
        overwrite=True,
        seed=config.seed,
        env="CartPole-v1",
        total_timesteps=config.ppo_timesteps,
    )


def run(config: Config) -> dict[str, Any]:
    """Runs all three, prints what changed, and writes the report.

    Returns:
        `sft_exact_match` and `grpo_exact_match` (share of 512 held-out sums that greedy completion gets right),
        `ppo_return` (mean return of the training episodes that ended in the last tenth of the run), `seconds`, `report`
        (a file); fewer after Ctrl-C.
    """
    validate(config)
    folder, start = Path(config.output_dir), time.perf_counter()
    tuned = sft.run(sft_config(config))
    if "model" not in tuned:
        return {}
    rewarded = grpo.run(grpo_config(config, tuned["model"]))
    if "model" not in rewarded:
        return {}
    balanced = ppo.run(ppo_config(config))
    if "train/return" not in balanced:
        return {}
    figures = {
        "sft_exact_match": tuned["eval_exact_match"],
        "grpo_exact_match": rewarded["eval_reward"],
        "ppo_return": balanced["train/return"],
        "ppo_greedy_return": balanced["eval/greedy_return"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    untrained = read_metrics(folder / "ppo")[0]["eval/sampled_return"]
    samples = answers([tuned["model"], rewarded["model"]], count=12)
    right = "held-out sums right, greedy"
    results = ReportTable(
        ["stage", "measured", "before", "after"],
        [
            ["SFT", right, f"{tuned['eval_exact_match_before']:.3f}", f"{tuned['eval_exact_match']:.3f}"],
            ["GRPO", right, f"{rewarded['eval_reward_before']:.3f}", f"{rewarded['eval_reward']:.3f}"],
            ["PPO", "return on CartPole-v1, sampled, of 500", f"{untrained:.1f}", f"{figures['ppo_return']:.1f}"],
        ],
    )
    table("Held-out sums", samples.columns, samples.rows)
    table("Before and after", results.columns, results.rows)
    figures["report"] = str(folder / "report.html")
    write_report(figures["report"], "jaxrl-llm quickstart", _sections(folder, results, samples, balanced))
    print(f"{figures['seconds']:.0f} seconds. Everything is in {folder}/; open {figures['report']}.")
    return figures


def answers(models: Sequence[str], *, count: int) -> ReportTable:
    """Lets models complete the first held-out sums greedily, side by side."""
    rows = load_rows("sums")
    held_out = split_indices(len(rows), held_out=HELD_OUT, seed=0)[1]
    chosen = [rows[i] for i in held_out[:: len(held_out) // count][:count]]
    columns = [[row.fields["prompt"] for row in chosen], [row.fields["answer"] for row in chosen]]
    for folder in models:
        model = load_model(ModelOptions(model=folder), jax.random.key(0))
        prompts = [tokenize_prompt(prompt_example(row).prompt, model.tokenizer) for row in chosen]
        columns.append(complete(model, model.params, prompts, jax.random.key(0), max_new_tokens=4))
    return ReportTable(["prompt", "right answer", "after SFT", "after GRPO"], list(zip(*columns, strict=True)))


def _sections(folder: Path, results: ReportTable, samples: ReportTable, balanced: dict[str, Any]) -> list[Section]:
    images = {
        "sft": {
            "Loss (nats per token)": ["loss", "eval_loss"],
            "Accuracy of held-out tokens": ["eval_mean_token_accuracy"],
        },
        "grpo": {"Reward (share right)": ["reward", "eval_reward"], "Entropy (nats per token)": ["entropy"]},
    }
    paths = {name: folder / f"{name}.png" for name in images}
    for name, panels in images.items():
        plot_metrics(folder / name, panels, paths[name])
    return [
        Section("What changed", tables=[results]),
        Section(
            "1. Supervised fine-tuning",
            "A new GPT-2 with two layers learns from right answers; the loss falls on the answers only.",
            images=[paths["sft"]],
        ),
        Section(
            "2. GRPO",
            "The model answers each sum eight times. Answers better than the mean of their group become more likely. "
            "The reward is measured on sampled answers to training sums, eval_reward on greedy answers to held-out ones.",
            tables=[samples],
            images=[paths["grpo"]],
        ),
        Section(
            "3. PPO on CartPole-v1",
            "The pole stays up for 500 steps at most. Time limits are no failures: the value of the last state counts.",
            images=[balanced["learning_curve"]],
        ),
    ]
