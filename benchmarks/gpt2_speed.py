"""GPT-2 on this machine: tokens a second of a training step and of sampling, and peak memory, against transformers.

    python -m benchmarks gpt2_speed
    python -m benchmarks gpt2_speed --peers parity/bin/python        # a Python with the extra `parity`

Training: SFT on full rows, every token a target, AdamW, gradients clipped to norm 1, float32. Sampling: 32 tokens of prompt
and 96 new ones, at temperature 1. Parameters are random; their time does not depend on what is in them.
"""

import sys
import time

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

from benchmarks import timing
from benchmarks.results import record

SIZES: dict[str, dict[str, int]] = {
    "124M": {},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "1.5B": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512},
}
"""GPT-2's, and two of ours, for all benchmarks of speed."""
ROWS, LENGTH = {"124M": 4, "small": 8}, {"124M": 256, "small": 128}
BATCH, PROMPT, NEW = 8, 32, 96


def train(size: str) -> None:
    """Times the recipe's own step."""
    from benchmarks.stepping import outline_gpt2, stepper
    from jaxrl_llm.models import GPT2Config
    from jaxrl_llm.recipes.options import ModelOptions

    rows = {"max_length": LENGTH[size], "per_device_train_batch_size": ROWS[size], "warmup_steps": 0}
    step, spent = stepper(outline_gpt2(GPT2Config(**SIZES[size]), "sft", ModelOptions(), **rows).programs)
    timing.report(step, compile_seconds=spent, packages=("jax", "jaxlib", "flax", "optax"))


def generate(size: str) -> None:
    """Times sampling, one program for prompt and new tokens."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm.models import GPT2, GPT2Config
    from jaxrl_llm.rollouts import generate

    module = GPT2(GPT2Config(**SIZES[size]))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ids = jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, 50_000)
    mask = jnp.ones_like(ids)
    started = time.perf_counter()
    sample = jax.jit(lambda params, key: generate(module.apply, params, key, ids, mask, max_new_tokens=NEW))
    compiled = sample.lower(params, jax.random.key(0)).compile()
    spent = time.perf_counter() - started
    key = jax.random.key(2)
    timing.report(
        lambda: jax.block_until_ready(compiled(params, key)), compile_seconds=spent, packages=("jax", "jaxlib", "flax")
    )


def main() -> None:
    """Races both sides and records the figures."""
    options = timing.parser(__doc__).parse_args()
    if options.one:
        {"train": train, "generate": generate}[options.one[0]](options.one[1])
        return
    figures: dict = {"limits": timing.limits()}
    for size in ROWS:
        for task in ("train", "generate"):
            sides = {"jaxrl_llm": [sys.executable, "-m", "benchmarks.gpt2_speed", "--one", task, size]}
            if options.peers:
                peer = [options.peers, "-m", "benchmarks.peers.transformers_gpt2", task, size]
                sides |= {"transformers": peer}
                sides |= {"transformers, torch.compile": [*peer, "--compile"]} if task == "train" else {}
            tokens = ROWS[size] * LENGTH[size] if task == "train" else BATCH * NEW
            figures[f"{size}, {task}"] = timing.race(sides, work=dict.fromkeys(sides, tokens), rounds=options.rounds)
            print(f"\n{size}, {task}\n\n{timing.table(figures[f'{size}, {task}'], 'tokens / s')}", flush=True)
            print(record("gpt2_speed", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
