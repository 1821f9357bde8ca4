"""A dry run: compiles a step of SFT, all parameters of a Llama of 7B, for 256 devices; nothing is allocated or run.

    python -m benchmarks.many_devices                                     # each mesh below, in a process of its own
    python -m benchmarks.many_devices --mesh data=8,fsdp=32 --devices 256

The devices are virtual ones of a CPU, so the program is XLA's plan for a CPU (without the float32 copies that it alone makes,
`outlines.CPU_PLAN`): bytes of arguments are those of any device, temporary bytes are an upper bound, for a CPU computes
bfloat16 as float32. A row of 2,048 tokens on each device that divides rows; bfloat16, remat, AdamW in float32.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import tyro

MESHES = ("data=256", "fsdp=256", "data=4,fsdp=64", "data=2,fsdp=32,tensor=4")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    mesh: str = ""
    """Devices; empty: each of a few, in a process of its own."""
    devices: int = 256
    """Virtual devices."""


def compiled(text: str) -> dict[str, Any]:
    """Compiles the step on a mesh; returns bytes for each device, and what devices exchange."""
    import jax

    from benchmarks.memory import LLAMA
    from jaxrl_llm.data import character_tokenizer
    from jaxrl_llm.models import Llama
    from jaxrl_llm.recipes.text import sft
    from jaxrl_llm.recipes.text.language_model import outline_of_module
    from jaxrl_llm.recipes.text.outlines import CPU_PLAN, outline_run
    from jaxrl_llm.training.parallel import num_shards, parse_mesh, shardings
    from jaxrl_llm.types import ROW_AXES

    mesh = parse_mesh(text)
    assert mesh is not None
    config = sft.Config(dtype="bfloat16", remat=True, max_length=2048, per_device_train_batch_size=num_shards(mesh))
    run = outline_run(outline_of_module(Llama(LLAMA), character_tokenizer("ab"), config), config)
    step = run.programs["step"]
    state, batch, key, fixed = step.arguments
    where = shardings(state, mesh)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROW_AXES))

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arguments = jax.tree.map(placed, state, where), jax.tree.map(lambda leaf: placed(leaf, rows), batch), key, fixed
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        jitted = jax.jit(step.function, donate_argnums=0, out_shardings=(where, None))
        program = jitted.lower(*arguments).compile(CPU_PLAN)
    memory, words = program.memory_analysis(), program.as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {
        "mesh": text,
        "rows": num_shards(mesh),
        "state_gigabytes_per_device": memory.argument_size_in_bytes / 1e9,
        "temporary_gigabytes_per_device": memory.temp_size_in_bytes / 1e9,
        "seconds_to_compile": time.perf_counter() - started,
        "collectives": {kind: words.count(f" {kind}(") + words.count(f" {kind}-start(") for kind in kinds},
    }


def main() -> None:
    """Compiles on the mesh that is asked for, or on all, and records the figures."""
    config = tyro.cli(Config, description=__doc__)
    if config.mesh:
        os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={config.devices}"
        print(json.dumps(compiled(config.mesh)))
        return
    from benchmarks.results import record

    figures = {}
    for mesh in MESHES:
        command = [sys.executable, "-m", "benchmarks.many_devices", "--mesh", mesh, "--devices", str(config.devices)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[mesh] = json.loads(output.splitlines()[-1])
        print(figures[mesh], flush=True)
    print(
        record(
            "many_devices", {"devices": f"{config.devices} virtual, CPU", "meshes": figures}, packages=("flax", "optax")
        )
    )


if __name__ == "__main__":
    main()
