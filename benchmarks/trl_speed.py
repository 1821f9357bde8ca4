"""One iteration of GRPO and one step of DPO on a small GPT-2, in seconds, against TRL's trainers.

    python -m benchmarks trl_speed
    python -m benchmarks trl_speed --peers parity/bin/python         # a Python with the extra `parity`

GPT-2 with 4 layers of 256 and its whole vocabulary, float32, random parameters. GRPO: 8 prompts of 16 tokens, 8 completions of
64 tokens each, no reference model, the reward of a Python function. DPO: 8 pairs of rows of 105 tokens with a reference model,
scored in each step. AdamW. TRL's time is that between its callbacks, without what it does before the first step.
"""

import sys
import time

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

from benchmarks import timing
from benchmarks.results import record

SIZE = {"n_layer": 4, "n_head": 4, "n_embd": 256}
PROMPTS, GROUP, PROMPT, COMPLETION = 8, 8, 16, 64
PAIRS, PAIR_LENGTH = 8, 105
TASKS = {"grpo": "iterations / s", "dpo": "steps / s"}


def ours(task: str) -> None:
    """Times the programs that the recipe runs in an iteration or a step, one after the other."""
    import jax
    import numpy as np

    from benchmarks.online_memory import made_up
    from jaxrl_llm.data import character_tokenizer
    from jaxrl_llm.models import GPT2, GPT2Config
    from jaxrl_llm.recipes.options import ModelOptions
    from jaxrl_llm.recipes.text.language_model import outline_of_module
    from jaxrl_llm.recipes.text.outlines import outline_run, recipe_config

    options: dict = {"max_length": PAIR_LENGTH, "per_device_train_batch_size": PAIRS, "warmup_steps": 0}
    if task == "grpo":
        lengths = {"max_prompt_length": PROMPT, "max_completion_length": COMPLETION}
        options = {"num_prompts": PROMPTS, "num_generations": GROUP, **lengths}
    model = outline_of_module(GPT2(GPT2Config(**SIZE)), character_tokenizer("ab"), ModelOptions())
    programs = outline_run(
        model, recipe_config("grpo" if task == "grpo" else "dpo", ModelOptions(), **options)
    ).programs
    started = time.perf_counter()
    compiled = {name: program.compile(as_run=True) for name, program in programs.items()}
    spent = time.perf_counter() - started
    inputs = {name: jax.tree.map(made_up, program.arguments) for name, program in programs.items()}
    first, last = programs
    state, *others = inputs[last]
    held = [state]
    del state  # an update takes over its memory

    def step() -> None:
        result = jax.block_until_ready(compiled[first](*inputs[first]))
        if task == "grpo":
            [float(len(set(row))) for row in np.asarray(result.ids).tolist()]  # rewards, on the host
        held.append(jax.block_until_ready(compiled[last](held.pop(), *others))[0])

    timing.report(step, compile_seconds=spent, packages=("jax", "jaxlib", "flax", "optax"))


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
