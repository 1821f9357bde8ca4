"""One iteration of GRPO and one step of DPO on a small GPT-2, in seconds, against TRL's trainers.

    python -m benchmarks trl_speed
    python -m benchmarks trl_speed --peers parity/bin/python         # a Python with the extra `parity`

GPT-2 with 4 layers of 256 and its whole vocabulary, float32, random parameters. GRPO: 8 prompts of 16 tokens, 8 completions of
64 tokens each, no reference model, the reward of a Python function. DPO: 8 pairs of rows of 105 tokens with a reference model,
scored in each step. AdamW. TRL's time is that between its callbacks, without what it does before the first step.
"""

import sys

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

from benchmarks import timing
from benchmarks.gpt2_speed import SIZES
from benchmarks.results import record

PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 16, 64
PAIRS, PAIR_LENGTH = 8, 105
TASKS = {"grpo": "iterations / s", "dpo": "steps / s"}


def ours(task: str) -> None:
    """Times the programs that the recipe runs in an iteration or a step, one after the other."""
    from benchmarks.stepping import outline_gpt2, stepper
    from jaxrl_llm.models import GPT2Config
    from jaxrl_llm.recipes.options import ModelOptions

    config, options = GPT2Config(**SIZES["small"]), ModelOptions()
    if task == "grpo":
        size = {"num_prompts": PROMPTS, "num_generations": GROUP, "max_prompt_length": PROMPT}
        run = outline_gpt2(config, "grpo", options, max_completion_length=COMPLETION, **size)
    else:
        rows = {"max_length": PAIR_LENGTH, "per_device_train_batch_size": PAIRS, "warmup_steps": 0}
        run = outline_gpt2(config, "dpo", options, **rows)
    step, spent = stepper(run.programs, rewards if task == "grpo" else lambda log_probs: None)
    timing.report(step, compile_seconds=spent, packages=("jax", "jaxlib", "flax", "optax"))


def rewards(completions) -> list[float]:
    """Rewards each completion by its number of different tokens, on the host, as TRL's side does by words."""
    return [float(len(set(row))) for row in completions.ids.tolist()]


def main() -> None:
    """Races both sides and records the figures."""
    options = timing.parser(__doc__).parse_args()
    if options.one:
        ours(options.one[0])
        return
    figures: dict = {"limits": timing.limits()}
    for task, unit in TASKS.items():
        sides = {"jaxrl_llm": [sys.executable, "-m", "benchmarks.trl_speed", "--one", task]}
        if options.peers:
            sides["TRL"] = [options.peers, "-m", "benchmarks.peers.trl_step", task]
        figures[task] = timing.race(sides, work=dict.fromkeys(sides, 1), rounds=options.rounds)
        print(f"\n{task}\n\n{timing.table(figures[task], unit)}", flush=True)
        print(record("trl_speed", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
