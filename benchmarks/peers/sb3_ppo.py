"""PPO of Stable-Baselines3 or of sbx, its sister in JAX: stable_baselines3|sbx ENVIRONMENTS STEPS."""

import importlib
import sys

from stable_baselines3.common.env_util import make_vec_env

from benchmarks import timing

package, num_envs, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
envs = make_vec_env("CartPole-v1", n_envs=num_envs, seed=0)
settings = {"n_steps": 128, "batch_size": num_envs * 32, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
PPO = importlib.import_module(package).PPO
model = PPO("MlpPolicy", envs, **settings, seed=0, **({"device": "cpu"} if package == "stable_baselines3" else {}))
versions = ("torch", "stable_baselines3", "gymnasium", *(("sbx-rl", "jax") if package == "sbx" else ()))
timing.report(lambda: model.learn(steps, reset_num_timesteps=False), repeats=2, packages=versions)
