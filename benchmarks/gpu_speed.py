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
from benchmarks.gpt2_speed import SIZES
from benchmarks.results import record
from benchmarks.stepping import outline_gpt2, stepper
from benchmarks.timing import median_seconds
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.rollouts import generate

OPTIONS = ModelOptions(dtype="bfloat16", chunk_size=256)


def config_of(size: str) -> GPT2Config:
    """Makes the configuration of a GPT-2 that computes in bfloat16."""
    return dataclasses.replace(GPT2Config(**SIZES[size]), dtype="bfloat16")


def rates(size: int) -> dict[str, float]:
    """Measures bfloat16 products (FLOP/s), and reading memory (bytes/s)."""
    square, long = jnp.ones((size, size), jnp.bfloat16), jnp.ones((64, size * size // 64))
    product, largest = jax.jit(lambda x: x @ x), jax.jit(lambda x: x.max(1))
    flops = 2 * size**3 / median_seconds(lambda: product(square).block_until_ready(), 10)
    return {"flops": flops, "bytes": long.nbytes / median_seconds(lambda: largest(long).block_until_ready(), 10)}


def training(name: str, rows: int, length: int, limit: float) -> dict[str, float]:
    """Times a step of SFT."""
    config, settings = config_of(name), {"max_length": length, "per_device_train_batch_size": rows, "warmup_steps": 0}
    run = outline_gpt2(config, "sft", OPTIONS, **settings)
    parameters = sum(x.size for x in jax.tree.leaves(run.trained)) - config.n_positions * config.n_embd
    flops = rows * length * (6 * parameters + 6 * config.n_layer * length * config.n_embd)
    seconds = median_seconds(stepper(run.programs)[0], 10)
    return {"tokens_per_second": rows * length / seconds, "mfu": flops / seconds / limit, "seconds": seconds}


def decoding(name: str, batch: int, new: int, limit: float) -> dict[str, float]:
    """Times sampling; the prompt is one token."""
    config = config_of(name)
    module = GPT2(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params, ids = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), jnp.ones((batch, 1), jnp.int32)
    sample = jax.jit(lambda params, key: generate(module.apply, params, key, ids, ids, max_new_tokens=new))
    seconds = median_seconds(lambda: jax.block_until_ready(sample(params, jax.random.key(1))), 5)
    cache = 2 * config.n_layer * batch * new * config.n_embd * 2
    read = sum(x.nbytes for x in jax.tree.leaves(params)) + cache
    return {"tokens_per_second": batch * new / seconds, "bandwidth_share": new * read / seconds / limit}


def control(num_envs: int, agents: int, updates: int = 20) -> float:
    """Times PPO on CartPole in environment steps a second, all agents together."""
    config = dataclasses.replace(ppo.PRESETS["cleanrl"], num_envs=num_envs, total_timesteps=updates * 128 * num_envs)
    keys = jax.random.split(jax.random.key(0), agents)
    train = jax.jit(jax.vmap(lambda key: ppo.train(key, config)[1]["loss"]))
    return agents * config.total_timesteps / median_seconds(lambda: train(keys).block_until_ready(), 3)


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
    for name in ("tiny",) if tiny else ("124M", "355M", "1.5B"):
        figures[f"training {name}"] = training(name, rows, length, limit["flops"])
        figures[f"decoding {name}"] = decoding(name, batch, new, limit["bytes"])
        if options.peers:
            command = [options.peers, "-m", "benchmarks.peers.torch_gpu", name, str(rows), str(length)]
            found = timing.race({"torch.compile": command}, work={"torch.compile": rows * length}, rounds=1)
            figures[f"training {name}, torch"] = {"tokens_per_second": found["torch.compile"]["rate"]}
    lengths = {"max_prompt_length": 8 if tiny else 64, "max_completion_length": 8 if tiny else 256}
    group = {"num_prompts": 2 if tiny else 16, "num_generations": 8}
    grpo = outline_gpt2(config_of("tiny" if tiny else "124M"), "grpo", OPTIONS, **group, **lengths)
    figures["grpo_iterations_per_second"] = 1 / median_seconds(stepper(grpo.programs)[0], 5)
    for num_envs in (4,) if tiny else (2_048, 8_192, 65_536):
        figures[f"ppo_steps_per_second, {num_envs} environments"] = control(num_envs, 1)
    figures["ppo_steps_per_second, many agents"] = control(4, 2 if tiny else 1024)
    print(figures, f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    print("not recorded" if tiny else record("gpu_speed", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
