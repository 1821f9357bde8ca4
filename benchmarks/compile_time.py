"""What XLA spends on compiling one iteration of GRPO for a one-layer GPT-2, as users compile and as most tests do.

    python -m benchmarks.compile_time

Processor seconds of tracing and lowering, and of compiling, each in a process of its own; the median of three.
"""

import json
import os
import subprocess
import sys
import time

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import record
from jaxrl_llm.models import GPT2, GPT2Config, head_kernel
from jaxrl_llm.recipes.text import grpo
from jaxrl_llm.recipes.text.experience import Policy
from jaxrl_llm.recipes.text.iteration import make_iteration, start_state
from jaxrl_llm.recipes.text.prompts import Prompts

OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
SETTINGS = {
    "as users do": ("0", ""),
    "jax_disable_most_optimizations": ("1", ""),
    OLDER_EMITTERS: ("0", OLDER_EMITTERS),
    "both, as quick_compilation of the tests": ("1", OLDER_EMITTERS),
}


def measure() -> dict[str, float]:
    """Compiles the iteration in this process."""
    model = GPT2(GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    config = grpo.Config(num_prompts=8, num_generations=8, max_completion_length=3, beta=0.04, num_iterations=2)
    optimizer, method = config.optimizer(10), grpo.make_method(config)

    def reward(completions, columns):
        return (completions.ids == 7).sum(-1).astype(jnp.float32)

    policy = Policy(model.apply, head_kernel)
    iteration = make_iteration(policy, optimizer, method, reward, config, eos_ids=(0,), pad_id=1)
    prompts = Prompts(jnp.ones((8, 4), jnp.int32), jnp.ones((8, 4), bool), {})
    state = start_state(method, params, optimizer)
    started = time.process_time()
    lowered = jax.jit(iteration).lower(state, prompts, jax.random.key(0), params)
    between = time.process_time()
    lowered.compile()
    return {"trace_and_lower": between - started, "compile": time.process_time() - between}


def main() -> None:
    """Measures every setting and records the figures."""
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(measure()))
        return
    figures = {}
    for name, (unoptimized, flag) in SETTINGS.items():
        changes = {"JAX_DISABLE_MOST_OPTIMIZATIONS": unoptimized, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
        command = [sys.executable, "-m", "benchmarks.compile_time", "--one"]
        options = {"env": os.environ | changes, "check": True, "capture_output": True, "text": True}
        runs = [json.loads(subprocess.run(command, **options).stdout) for _ in range(3)]
        figures[name] = {part: float(np.median([run[part] for run in runs])) for part in runs[0]}
        print(name, figures[name], flush=True)
    print(record("compile_time", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
