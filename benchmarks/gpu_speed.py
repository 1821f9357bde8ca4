"""On an accelerator: GPT-2's training against the measured matmul rate and torch, decoding against the bandwidth, PPO, GRPO.

    python -m benchmarks gpu_speed
    python -m benchmarks gpu_speed --peers parity/bin/python         # torch.compile with flash attention, in the same run
    python -m benchmarks gpu_speed --tiny                            # the same programs, small enough for a CPU

bfloat16 with float32 masters. MFU: 6 × parameters × tokens, and attention, by the measured rate of bfloat16 products of 8,192².
Share of bandwidth: bytes of parameters and cache that a step of decoding reads, by the measured rate of reading memory.
"""

import dataclasses
import sys
import time
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.online_memory import made_up
from benchmarks.results import record
from jaxrl_llm.data import character_tokenizer
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text.language_model import outline_of_module
from jaxrl_llm.recipes.text.outlines import Outline, outline_run, recipe_config
from jaxrl_llm.rollouts import generate

SIZES: dict[str, dict[str, int]] = {
    "124M": {},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "1.5B": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
TINY: dict[str, dict[str, int]] = {"tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512}}
OPTIONS = ModelOptions(dtype="bfloat16", chunk_size=256)


def seconds_of(call: Any, repeats: int = 10) -> float:
    """Warms up, and returns the median of `repeats` calls."""
    call()
    return sorted(timing.timed(call) for _ in range(repeats))[repeats // 2]


def rates(size: int) -> dict[str, float]:
    """Measures bfloat16 products (FLOP/s), and reading memory (bytes/s)."""
    square, long = jnp.ones((size, size), jnp.bfloat16), jnp.ones((64, size * size // 64))
    product, largest = jax.jit(lambda x: x @ x), jax.jit(lambda x: x.max(1))
    flops = 2 * size**3 / seconds_of(lambda: product(square).block_until_ready())
    return {"flops": flops, "bytes": long.nbytes / seconds_of(lambda: largest(long).block_until_ready())}


def run_of(name: str, recipe: Any, settings: dict[str, Any]) -> Outline:
    """Outlines a run of a GPT-2."""
    config = GPT2Config(**(SIZES | TINY)[name], dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    model = outline_of_module(GPT2(config), character_tokenizer("ab"), OPTIONS)
    return outline_run(model, recipe_config(recipe, OPTIONS, **settings))


def stepper(run: Outline, names: tuple[str, ...]) -> Any:
    """Compiles programs, and makes a call that runs them once; the last takes over the state that it gave before."""
    compiled = {name: run.programs[name].compile(as_run=True) for name in names}
    inputs = {name: jax.tree.map(made_up, run.programs[name].arguments) for name in names}
    held = [inputs[names[-1]][0]]
    rest = inputs[names[-1]][1:]
    inputs[names[-1]] = None

    def call() -> None:
        for name in names[:-1]:
            jax.block_until_ready(compiled[name](*inputs[name]))
        held.append(jax.block_until_ready(compiled[names[-1]](held.pop(), *rest))[0])

    return call


def training(name: str, rows: int, length: int, limit: float) -> dict[str, float]:
    """Times a step of SFT."""
    run = run_of(name, "sft", {"max_length": length, "per_device_train_batch_size": rows, "warmup_steps": 0})
    config = GPT2Config(**(SIZES | TINY)[name])
    parameters = sum(x.size for x in jax.tree.leaves(run.trained)) - length * config.n_embd
    flops = rows * length * (6 * parameters + 6 * config.n_layer * length * config.n_embd)
    seconds = seconds_of(stepper(run, ("step",)))
    return {"tokens_per_second": rows * length / seconds, "mfu": flops / seconds / limit, "seconds": seconds}


def decoding(name: str, batch: int, new: int, limit: float) -> dict[str, float]:
    """Times sampling; the prompt is one token."""
    config = GPT2Config(**(SIZES | TINY)[name], dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    module = GPT2(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params, ids = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), jnp.ones((batch, 1), jnp.int32)
    sample = jax.jit(lambda params, key: generate(module.apply, params, key, ids, ids, max_new_tokens=new))
    seconds = seconds_of(lambda: jax.block_until_ready(sample(params, jax.random.key(1))), 5)
    cache = 2 * config.n_layer * batch * new * config.n_embd * 2
    read = sum(x.nbytes for x in jax.tree.leaves(params)) + cache
    return {"tokens_per_second": batch * new / seconds, "bandwidth_share": new * read / seconds / limit}


def control(num_envs: int, agents: int, updates: int = 20) -> float:
    """Times PPO on CartPole in environment steps a second, all agents together."""
    config = dataclasses.replace(ppo.PRESETS["cleanrl"], num_envs=num_envs, total_timesteps=updates * 128 * num_envs)
    keys = jax.random.split(jax.random.key(0), agents)
    train = jax.jit(jax.vmap(lambda key: ppo.train(key, config)[1]["loss"]))
    return agents * config.total_timesteps / seconds_of(lambda: train(keys).block_until_ready(), 3)


def main() -> None:
    """Measures, where there is an accelerator, and records."""
    parser = timing.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small programs, on any device; nothing is recorded")
    options = parser.parse_args()
    if jax.default_backend() == "cpu" and not options.tiny:
        print("gpu_speed needs an accelerator, and jax found only a CPU: nothing was measured.")
        return
    started, tiny = time.perf_counter(), options.tiny
    limit = rates(512 if tiny else 8192)
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "limits": limit}
    rows, length, batch, new = (2, 32, 2, 8) if tiny else (16, 1024, 64, 512)
    for name in TINY if tiny else SIZES:
        figures[f"training {name}"] = training(name, rows, length, limit["flops"])
        figures[f"decoding {name}"] = decoding(name, batch, new, limit["bytes"])
        if options.peers:
            command = [options.peers, "-m", "benchmarks.peers.torch_gpu", name, str(rows), str(length)]
            found = timing.race({"torch.compile": command}, work={"torch.compile": rows * length}, rounds=1)
            figures[f"training {name}, torch"] = {"tokens_per_second": found["torch.compile"]["rate"]}
    lengths = {"max_prompt_length": 8 if tiny else 64, "max_completion_length": 8 if tiny else 256}
    grpo = run_of(
        "tiny" if tiny else "124M", "grpo", {"num_prompts": 2 if tiny else 16, "num_generations": 8, **lengths}
    )
    figures["grpo_iterations_per_second"] = 1 / seconds_of(stepper(grpo, ("sampling", "update")), 5)
    for num_envs in (4,) if tiny else (2_048, 8_192, 65_536):
        figures[f"ppo_steps_per_second, {num_envs} environments"] = control(num_envs, 1)
    figures["ppo_steps_per_second, many agents"] = control(4, 2 if tiny else 1024)
    print(figures, f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    print("not recorded" if tiny else record("gpu_speed", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
