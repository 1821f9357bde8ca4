"""rejax's PPO, without its evaluations: ENVIRONMENTS STEPS SEEDS."""

import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type="

import jax
from rejax import PPO

from benchmarks import timing

num_envs, steps, seeds = map(int, sys.argv[1:])
steps = steps // (num_envs * 128) * num_envs * 128
size = {"num_envs": num_envs, "num_steps": 128, "total_timesteps": steps, "eval_freq": steps}
rest = {"num_epochs": 4, "num_minibatches": 4, "learning_rate": 2.5e-4, "max_grad_norm": 0.5, "clip_eps": 0.2}
agent = {"activation": "tanh", "hidden_layer_sizes": (64, 64)}
algorithm = PPO.create(env="CartPole-v1", ent_coef=0.01, vf_coef=0.5, agent_kwargs=agent, **size, **rest)
algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
keys = jax.random.split(jax.random.PRNGKey(0), seeds)
started = time.perf_counter()
train = jax.vmap(algorithm.train) if seeds > 1 else lambda keys: algorithm.train(keys[0])
compiled = jax.jit(train).lower(keys).compile()
spent = time.perf_counter() - started
timing.report(
    lambda: jax.block_until_ready(compiled(keys)), compile_seconds=spent, packages=("jax", "jaxlib", "gymnax", "rejax")
)
