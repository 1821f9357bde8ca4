"""PureJaxRL's own PPO, from a copy of its repository: FOLDER ENVIRONMENTS STEPS SEEDS."""

import os
import sys
import time
import types

os.environ["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type="
# Its wrappers import these for other environments; CartPole needs none of them.
for name in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"):
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["brax"].envs = sys.modules["brax.envs"]
for wrapper in ("EpisodeWrapper", "AutoResetWrapper"):
    setattr(sys.modules["brax.envs.wrappers.training"], wrapper, None)

import jax

from benchmarks import timing

sys.path.insert(0, os.path.join(sys.argv[1], "purejaxrl"))
from ppo import make_train

num_envs, steps, seeds = map(int, sys.argv[2:])
config = {"LR": 2.5e-4, "NUM_ENVS": num_envs, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": steps, "UPDATE_EPOCHS": 4}
config |= {"NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5}
config |= {"MAX_GRAD_NORM": 0.5, "ACTIVATION": "tanh", "ENV_NAME": "CartPole-v1", "ANNEAL_LR": True, "DEBUG": False}
train = make_train(config)
keys = jax.random.split(jax.random.PRNGKey(0), seeds)
started = time.perf_counter()
compiled = jax.jit(jax.vmap(train) if seeds > 1 else lambda keys: train(keys[0])).lower(keys).compile()
spent = time.perf_counter() - started
timing.report(
    lambda: jax.block_until_ready(compiled(keys)),
    compile_seconds=spent,
    packages=("jax", "jaxlib", "gymnax", "distrax"),
)
