"""The classical RLHF pipeline on human ratings, in one command: pretrain, SFT, reward model, then PPO, GRPO and DPO.

    python -m benchmarks.real_data vader --output data       # once: fetches film reviews that people rated
    python -m benchmarks.rlhf                                # a stage that `--runs` holds already is not run again

1. A GPT-2 of 2.2 million parameters is pretrained on 8,494 film reviews.
2. SFT teaches it to finish a review from its first three words.
3. A reward model learns from 8,000 pairs which review people rated higher. Its score is scaled to deviation 1 on samples of
   the SFT model, as in the GPT-2 experiments of Ziegler et al. (2019).
4. PPO and GRPO raise that reward, with a KL penalty to the SFT model; DPO learns from the same pairs without it.

Reported for each, once for reviews from nothing (the BOS token) and once for beginnings of held-out reviews: the reward, in
deviations above the SFT model; the KL to it, in nats; and the mean sentiment by VADER's lexicon, which nothing was trained on.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import offline_runs
from benchmarks.baselines import sentiment
from benchmarks.offline_runs import load, timed
from benchmarks.plots import curves, read_curve
from benchmarks.results import FOLDER, record
from benchmarks.vader_data import PROMPT
from jaxrl_llm.data import prompt_example
from jaxrl_llm.models import from_pretrained_reward_model, save_pretrained
from jaxrl_llm.recipes.text import dpo, grpo, ppo, reward_model, sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, decode, load_rows
from jaxrl_llm.recipes.text.model_rewards import reward_model_scores
from jaxrl_llm.recipes.text.prompts import PromptTable, make_prompt_table
from jaxrl_llm.rollouts import generate, score_completions

BEGINNING = 3
"""Words of a review that make a prompt."""
COMPLETION_TOKENS = 32
SAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    data: Path = Path("data")
    """Folder that benchmarks.real_data wrote."""
    runs: Path = Path("runs")
    """Folder for the stages."""
    iterations: int = 120
    """Iterations of PPO and of GRPO, of 128 completions each."""
    seed: int = 0
    """Seed of everything."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def make_data(config: Config) -> dict[str, str]:
    """Makes the files of the stages from the reviews: what to finish, and what to begin from."""

    def beginnings(side: str) -> list[dict[str, Any]]:
        texts = [json.loads(line)["text"].split(" ") for line in (config.data / f"vader/texts_{side}.jsonl").open()]
        return [
            {"prompt": PROMPT + " ".join(w[:BEGINNING]), "completion": " " + " ".join(w[BEGINNING:])}
            for w in texts
            if len(w) > BEGINNING + 3
        ]

    folder, train, held_out = config.runs / "rlhf", beginnings("train"), beginnings("eval")
    half = len(held_out) // 2
    from_nothing = [{"prompt": PROMPT}] * half
    prompts = [{"prompt": row["prompt"]} for row in held_out]
    return {
        "sft_train": write_rows(folder / "sft_train.jsonl", train),
        "sft_eval": write_rows(folder / "sft_eval.jsonl", held_out[half:]),
        "prompts": write_rows(folder / "prompts.jsonl", prompts[:half] + from_nothing),
        "beginnings": write_rows(folder / "beginnings.jsonl", prompts[half : half + SAMPLES]),
        "nothing": write_rows(folder / "nothing.jsonl", [{"prompt": PROMPT}] * SAMPLES),
    }


def stage(config: Config, name: str, recipe: Any, **settings: Any) -> dict[str, Any]:
    """Runs a recipe unless its model is there; returns its figures, which are kept beside the model."""
    folder = config.runs / "rlhf" / name
    kept = folder / "figures.json"
    if not kept.is_file():
        run = recipe.Config(output_dir=str(folder), overwrite=True, seed=config.seed, **settings)
        figures = timed(partial(recipe.run, run))
        if "model" not in figures:
            raise SystemExit(f"{name} was stopped; run this again.")
        kept.write_text(json.dumps(figures, default=float))
    return json.loads(kept.read_text())


def read_prompts(model: LanguageModel, path: str) -> PromptTable:
    """Reads prompts of a file."""
    return make_prompt_table(model, [prompt_example(row) for row in load_rows(path)], max_prompt_length=64)


def sampled(model: LanguageModel, prompts: PromptTable, seed: int):
    """Samples a completion of each prompt; returns (prompt ids, prompt mask, completion ids, completion mask)."""
    batch = prompts.batch(np.arange(len(prompts.tokens)), model.pad_id)
    options = {"max_new_tokens": COMPLETION_TOKENS, "eos_id": model.eos_ids, "pad_id": model.pad_id}
    sample = jax.jit(partial(generate, model.apply, **options))
    completions = sample(model.params, jax.random.key(seed), batch.ids, batch.mask)
    return batch.ids, batch.mask, completions.ids, completions.mask


def normalize_reward(config: Config, model: LanguageModel, prompts: PromptTable, source: str) -> str:
    """Scales a reward model to deviation 1 on samples of the policy; returns its folder."""
    folder = config.runs / "rlhf/reward_normalized"
    module, params, tokenizer = from_pretrained_reward_model(source)
    scores = jax.jit(partial(reward_model_scores, module))(params, *sampled(model, prompts, config.seed + 5))
    scaled = params | {"score": {"kernel": params["score"]["kernel"] / jnp.std(scores)}}
    save_pretrained(folder, module, scaled, tokenizer)
    return str(folder)


def judge(
    model: LanguageModel, reference: LanguageModel, reward: str, prompts: PromptTable, seed: int
) -> dict[str, Any]:
    """Samples from a model and measures reward, KL and sentiment, with standard errors."""
    text = sampled(model, prompts, seed)
    module, params, _ = from_pretrained_reward_model(reward)
    scores = np.asarray(jax.jit(partial(reward_model_scores, module))(params, *text))

    def log_probs(one: LanguageModel) -> np.ndarray:
        scored = jax.jit(partial(score_completions, one.apply, one.head_kernel))(one.params, *text)
        return np.asarray(jnp.where(text[3], scored.log_probs, 0).sum(-1))

    kl = log_probs(model) - log_probs(reference)
    written = decode(model.tokenizer, text[2], text[3])
    begun = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts.tokens]
    texts = [start + rest for start, rest in zip(begun, written, strict=True)]
    feelings = np.array([sentiment(one) for one in texts])
    figures: dict[str, Any] = {}
    for name, values in {"reward": scores, "kl": kl, "sentiment": feelings}.items():
        figures |= {name: values.mean(), f"{name}/standard_error": values.std(ddof=1) / len(values) ** 0.5}
    return figures | {"mean_length": np.asarray(text[3]).sum(-1).mean(), "samples": texts[:4]}


def run(config: Config) -> dict[str, Any]:
    """Runs all stages that are not there yet, and judges the models."""
    data = make_data(config)
    base = config.runs / "vader_base/model"
    if not (base / "config.json").is_file():
        offline_runs.run_vader_base(offline_runs.Config(run="vader_base", data=config.data, runs=config.runs))
    small = {"max_length": 96, "per_device_train_batch_size": 32, "warmup_steps": 10, "eval_steps": 50}
    tuned = stage(
        config,
        "sft",
        sft,
        model=str(base),
        dataset=data["sft_train"],
        eval_dataset=data["sft_eval"],
        learning_rate=3e-4,
        max_steps=150,
        **small,
    )
    pairs = {
        name: str(config.data / f"vader/pairs_{side}.jsonl")
        for name, side in (("dataset", "train"), ("eval_dataset", "eval"))
    }
    rewarded = stage(
        config, "reward_model", reward_model, model=tuned["model"], learning_rate=3e-4, max_steps=300, **pairs, **small
    )
    start = load(tuned["model"])
    prompts = {name: read_prompts(start, data[name]) for name in ("nothing", "beginnings")}
    reward = normalize_reward(config, start, prompts["beginnings"], rewarded["model"])
    online: dict[str, Any] = {
        "model": tuned["model"],
        "dataset": data["prompts"],
        "reward_funcs": (f"reward_model:{reward}",),
        "traceable_rewards": True,
        "max_completion_length": COMPLETION_TOKENS,
        "max_steps": config.iterations,
        "eval_prompts": 128,
        "eval_steps": 30,
        "logging_steps": 5,
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
    }
    figures = {"sft": tuned, "reward_model": rewarded}
    figures["ppo"] = stage(
        config,
        "ppo",
        ppo,
        **online,
        num_prompts=128,
        num_generations=1,
        num_iterations=2,
        num_minibatches=2,
        value_model=reward,
        kl_coef=0.15,
        learning_rate=2e-4,
    )
    figures["grpo"] = stage(
        config, "grpo", grpo, **online, num_prompts=16, num_generations=8, beta=0.15, learning_rate=3e-4
    )
    figures["dpo"] = stage(
        config, "dpo", dpo, model=tuned["model"], beta=0.1, learning_rate=1e-4, max_steps=200, **pairs, **small
    )
    judged = {
        f"{name}/{place}": judge(load(figures[name]["model"]), start, reward, table, config.seed + 9)
        for name in ("sft", "dpo", "ppo", "grpo")
        for place, table in prompts.items()
    }
    for name, of_it in judged.items():
        of_it["reward_gain"] = of_it["reward"] - judged["sft/" + name.split("/")[1]]["reward"]
    plot(config)
    return judged | {f"{name}/run": value for name, value in figures.items()}


def plot(config: Config) -> None:
    """Draws the reward of samples over the iterations."""
    lines = {name.upper(): read_curve(config.runs / "rlhf" / name, "reward") for name in ("ppo", "grpo")}
    title = "RLHF on film reviews: the reward model's score of samples"
    curves(FOLDER / "rlhf.png", lines, "iteration (128 completions)", "reward (deviations of the SFT model)", title)


def main() -> None:
    """Runs the pipeline and records its figures."""
    print(record("rlhf", run(tyro.cli(Config, description=__doc__)), packages=("flax", "optax")))


if __name__ == "__main__":
    main()
