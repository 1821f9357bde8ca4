"""The programs of a recipe on made-up arrays, run for real: what benchmarks time. Time does not depend on what is in them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data import character_tokenizer
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text.language_model import outline_of_module
from jaxrl_llm.recipes.text.outlines import Outline, Program, Recipe, outline_run, recipe_config


def outline_gpt2(config: GPT2Config, recipe: Recipe, options: ModelOptions, **settings: Any) -> Outline:
    """Outlines a run of a recipe with a GPT-2."""
    model = outline_of_module(GPT2(config), character_tokenizer("ab"), options)
    return outline_run(model, recipe_config(recipe, options, **settings))


def made_up(shape: Any) -> jax.Array:
    """Makes an array of a shape: small positive numbers, true, or 0."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if shape.dtype == bool:
        return jnp.ones(shape.shape, bool)
    if jnp.issubdtype(shape.dtype, jnp.floating):
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.uniform(0, 0.02, shape.shape), shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


def stepper(
    programs: Mapping[str, Program], host: Callable[[Any], Any] = lambda result: None
) -> tuple[Callable[[], None], float]:
    """Compiles the programs of an iteration or a step, and makes the function that runs them once, in their order.

    Args:
        programs: By name; the last one updates the state, and takes over the memory of the one that it gave before.
        host: What is done on the host with the result of each of the others, such as rewards.

    Returns:
        The function, which waits for all results; and the seconds that compiling took.
    """
    *before, last = programs
    started = time.perf_counter()
    compiled = {name: program.compile(as_run=True) for name, program in programs.items()}
    spent = time.perf_counter() - started
    inputs = {name: jax.tree.map(made_up, programs[name].arguments) for name in before}
    state, *others = jax.tree.map(made_up, programs[last].arguments)
    held = [state]
    del state

    def step() -> None:
        for name in before:
            host(jax.block_until_ready(compiled[name](*inputs[name])))
        held.append(jax.block_until_ready(compiled[last](held.pop(), *others))[0])

    return step, spent
