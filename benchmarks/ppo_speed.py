"""PPO on CartPole-v1 with CleanRL's settings: environment steps a second, against PureJaxRL, rejax, SB3, sbx and CleanRL.

    python -m benchmarks ppo_speed
    python -m benchmarks ppo_speed --peers peers/bin/python --purejaxrl path/to/purejaxrl --cleanrl path/to/cleanrl

`benchmarks/peers/README.md` tells how to get the peers. All do the same work: 128 steps in each environment, then 4 epochs of
4 minibatches on two networks of 64 and 64 units, Adam, rates that fall to 0. Those in PyTorch or with environments in Python
run fewer steps, for their rate does not depend on how many.
"""

import dataclasses
import functools
import math
import os
import sys
import time

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

from benchmarks import timing
from benchmarks.results import record

CASES = {"4 environments": (4, 500_000, 1), "64 environments": (64, 2_000_000, 1), "8 seeds": (4, 500_000, 8)}
"""Environments, steps and seeds of each question."""
SLOW_STEPS = 20_480


def ours(num_envs: int, steps: int, seeds: int) -> None:
    """Times whole runs as one compiled program; several seeds are divided over the cores, and side by side on each."""
    import jax
    from jax.sharding import PartitionSpec

    if seeds > 1:
        jax.config.update("jax_num_cpu_devices", math.gcd(seeds, os.cpu_count() or 1))
    from jaxrl_llm.recipes.control import ppo

    per_update = num_envs * 128
    size = {"num_envs": num_envs, "num_steps": 128, "total_timesteps": steps // per_update * per_update}
    config = dataclasses.replace(ppo.PRESETS["cleanrl"], **size)
    keys = jax.random.split(jax.random.key(0), seeds)
    train = functools.partial(ppo.train, config=config)
    started = time.perf_counter()
    if seeds > 1:
        mesh, spec = jax.make_mesh((jax.device_count(),), ("seeds",)), PartitionSpec("seeds")
        train = jax.shard_map(jax.vmap(train), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    else:
        keys = keys[0]
    compiled = jax.jit(train).lower(keys).compile()
    spent = time.perf_counter() - started
    timing.report(
        lambda: jax.block_until_ready(compiled(keys)), compile_seconds=spent, packages=("jax", "jaxlib", "gymnax")
    )


def main() -> None:
    """Races all sides and records the figures."""
    parser = timing.parser(__doc__)
    parser.add_argument("--purejaxrl", help="the folder of its repository")
    parser.add_argument("--cleanrl", help="the folder of its repository")
    options = parser.parse_args()
    if options.one:
        ours(*map(int, options.one))
        return
    figures: dict = {"limits": timing.limits()}
    for case, (num_envs, steps, seeds) in CASES.items():
        size, few = [str(num_envs), str(steps), str(seeds)], SLOW_STEPS * num_envs // 4
        sides = {"jaxrl_llm": [sys.executable, "-m", "benchmarks.ppo_speed", "--one", *size]}
        work = {"jaxrl_llm": steps * seeds}
        if options.peers:
            peers = {"rejax": (["rejax_ppo", *size], steps * seeds)}
            if options.purejaxrl:
                peers["PureJaxRL"] = ["purejaxrl_ppo", options.purejaxrl, *size], steps * seeds
            if seeds == 1:
                peers["SB3"] = ["sb3_ppo", "stable_baselines3", str(num_envs), str(few)], few
                peers["sbx"] = ["sb3_ppo", "sbx", str(num_envs), str(few)], few
                if options.cleanrl:
                    peers["CleanRL"] = ["cleanrl_ppo", options.cleanrl, str(num_envs), str(few)], few
            for name, ((script, *words), done) in peers.items():
                sides[name], work[name] = [options.peers, "-m", f"benchmarks.peers.{script}", *words], done
        figures[case] = timing.race(sides, work=work, rounds=options.rounds)
        print(f"\n{case}\n\n{timing.table(figures[case], 'steps / s')}", flush=True)
        print(record("ppo_speed", figures, packages=("gymnax", "flax", "optax")))


if __name__ == "__main__":
    main()
