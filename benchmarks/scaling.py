"""How time and memory grow: log-probabilities with vocabulary and length, sampling with the group, PPO with environments.

    python -m benchmarks scaling

Temporary memory is that of the compiled program; seconds are the median of 5 runs. `dense` builds [batch, time, vocabulary].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp

from benchmarks.plots import curves
from benchmarks.results import FOLDER, record
from benchmarks.timing import limits, median_seconds
from jaxrl_llm.log_probs import chunked_token_statistics, token_log_probs
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.rollouts import generate

ROWS, LENGTH, HIDDEN, VOCAB, CHUNK = 4, 256, 256, 32_768, 32


def cost(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Compiles and runs a function; seconds, and temporary megabytes."""
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(*arguments)), 5)
    return {"seconds": seconds, "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6}


def log_probs(vocab: int = VOCAB, length: int = LENGTH) -> dict[str, dict[str, float]]:
    """Costs of the gradient of log-probabilities."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (ROWS, length, HIDDEN)), jax.random.normal(keys[1], (HIDDEN, vocab))
    tokens = jax.random.randint(keys[2], (ROWS, length), 0, vocab)

    def chunked(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return chunked_token_statistics(hidden, kernel, tokens, chunk_size=CHUNK).log_probs.sum()

    def dense(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return token_log_probs(hidden @ kernel, tokens).sum()

    ways = {"chunked": chunked, "dense": dense}
    return {name: cost(jax.grad(way, argnums=(0, 1)), hidden, kernel) for name, way in ways.items()}


def sampling(group: int) -> dict[str, dict[str, float]]:
    """Costs of `group` completions of one prompt."""
    module = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=HIDDEN))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ids, settings = jnp.ones((1, 16), jnp.int32), {"max_new_tokens": 32, "num_generations": group}
    return {
        "sampling": cost(
            lambda params, key: generate(module.apply, params, key, ids, ids, **settings), params, jax.random.key(1)
        )
    }


def control(num_envs: int) -> dict[str, dict[str, float]]:
    """Costs of 20 updates of PPO."""
    config = dataclasses.replace(ppo.PRESETS["cleanrl"], num_envs=num_envs, total_timesteps=20 * 128 * num_envs)
    return {"ppo": cost(lambda key: ppo.train(key, config), jax.random.key(0))}


QUESTIONS: dict[str, tuple[Callable[[int], dict], tuple[int, ...], str]] = {
    "vocabulary": (log_probs, (8_192, 16_384, 32_768, 65_536, 131_072), "tokens in the vocabulary"),
    "length": (lambda length: log_probs(length=length), (128, 256, 512, 1024), "tokens in a row"),
    "group": (sampling, (4, 8, 16, 32, 64), "completions of a prompt"),
    "environments": (control, (4, 16, 64, 256, 1024), "environments"),
}


def main() -> None:
    """Measures, plots and records."""
    figures: dict[str, Any] = {"limits": limits()}
    for name, (question, sizes, label) in QUESTIONS.items():
        found = {size: question(size) for size in sizes}
        figures[name] = {str(size): ways for size, ways in found.items()}
        print(name, figures[name], flush=True)
        for what, unit in {"seconds": "seconds", "temporary_mb": "temporary memory (MB)"}.items():
            lines = {way: (list(sizes), [found[size][way][what] for size in sizes]) for way in found[sizes[0]]}
            curves(
                FOLDER / f"scaling_{name}_{what}.png", lines, label, unit, f"{unit.capitalize()} by {label}", xlog=True
            )
    print(record("scaling", figures, packages=("flax", "optax", "gymnax")))


if __name__ == "__main__":
    main()
