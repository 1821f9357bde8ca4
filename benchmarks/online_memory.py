"""What an update costs in memory and time: SFT, DPO, RLOO, GRPO, PPO and TRPO on the same rows, all parameters or LoRA.

    python -m benchmarks.online_memory                       # GPT-2 124M: the bytes of compiled programs; nothing is allocated
    python -m benchmarks.online_memory --measured            # a smaller GPT-2, run for real: seconds and peak memory too

A row is a prompt of 64 tokens with a completion of 64; DPO takes half of the rows as chosen, the others as rejected. State:
parameters that are trained, their optimizer (AdamW, 8 bytes a parameter), a reference model and a frozen base, all in float32.
Temporary: what the largest program of the run needs beside them: gradients and activations. Seconds are those of the update;
what it reads is made up, for its time does not depend on what is in it.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import numpy as np
import tyro

from benchmarks.results import record
from benchmarks.stepping import made_up
from jaxrl_llm.data import character_tokenizer
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import rloo, trpo
from jaxrl_llm.recipes.text.estimate import bytes_of, need_of
from jaxrl_llm.recipes.text.language_model import outline_of_module
from jaxrl_llm.recipes.text.outlines import Outline, outline_online, outline_run, recipe_config

ROWS, PROMPT, COMPLETION = 16, 64, 64
SIZES = {
    "gpt2": GPT2Config(),
    "small": GPT2Config(n_layer=4, n_head=4, n_embd=256, n_positions=256),
}
ONLINE: dict[str, Any] = {"num_prompts": 2, "num_generations": 8}
ONLINE |= {"max_prompt_length": PROMPT, "max_completion_length": COMPLETION}
CHUNK = {"chunk_size": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    measured: bool = False
    """Run the smaller model for real, each method in a process of its own."""
    one: str = ""
    """Measure this one in this process and print it; used by `--measured`."""


METHODS = ("sft", "dpo", "grpo", "grpo with reference", "rloo with reference", "ppo, shared network", "ppo", "trpo")


def outline(name: str, size: str) -> Outline:
    """Outlines a run of a method; a name may end in ` + LoRA`."""
    plain, lora = name.removesuffix(" + LoRA"), name.endswith(" + LoRA")
    options = ModelOptions(lora=lora, **CHUNK)
    model = outline_of_module(GPT2(SIZES[size]), character_tokenizer("ab"), options)
    if plain in ("sft", "dpo"):
        rows = {"max_length": PROMPT + COMPLETION, "per_device_train_batch_size": ROWS // (1 + (plain == "dpo"))}
        return outline_run(model, recipe_config(plain, options, warmup_steps=0, **rows))
    if plain.startswith("ppo"):
        network = "shared" if "shared" in plain else "separate"
        return outline_run(model, recipe_config("ppo", options, **ONLINE, num_iterations=1, value_network=network))
    if plain.startswith("grpo"):
        return outline_run(model, recipe_config("grpo", options, **ONLINE, beta=0.04 if "reference" in plain else 0.0))
    if plain == "trpo":
        trust = trpo.Config(lora=lora, **CHUNK, **ONLINE)
        method, optimizer = trpo.make_method(trust), trpo.make_optimizer(trust)
        return outline_online(model, trust, method, optimizer, needs_reference=False)
    leave = rloo.Config(lora=lora, **CHUNK, **ONLINE)
    return outline_online(model, leave, rloo.make_method(leave), leave.optimizer(1000), needs_reference=True)


def compiled_bytes(name: str, size: str) -> dict[str, float]:
    """Compiles the programs of a run from shapes alone; returns its figures."""
    need = need_of(outline(name, size))
    state = (need.parameters + need.optimizer + need.reference) / 1e6
    return figures_of(state, need.temporary / 1e6, need.trained_parameters)


def figures_of(state: float, temporary: float, trained: int) -> dict[str, float]:
    """Names the megabytes of a run and the number of parameters that it trains."""
    megabytes = {"state_megabytes": state, "temporary_megabytes": temporary, "megabytes": state + temporary}
    return megabytes | {"trained_parameters": trained}


def measure(name: str) -> dict[str, float]:
    """Runs updates of the smaller model; returns megabytes, seconds (median of 7) and the peak of resident memory."""
    run = outline(name, "small")
    program = run.programs.get("update") or run.programs["step"]
    compiled = program.compile(as_run=True)
    state, *others = jax.tree.map(made_up, program.arguments)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(8):
        started = time.perf_counter()
        state = jax.block_until_ready(compiled(state, *others))[0]
        times.append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = bytes_of((run.trained, run.frozen, run.opt_state, run.reference)) / 1e6
    trained = sum(x.size for x in jax.tree.leaves(run.trained))
    return figures_of(held, compiled.memory_analysis().temp_size_in_bytes / 1e6, trained) | {
        "seconds": float(np.median(times[1:])),
        "peak_resident_megabytes": after / 1e3,
        "peak_before_updates_megabytes": before / 1e3,
    }


def main() -> None:
    """Measures every method and records the figures."""
    config = tyro.cli(Config, description=__doc__)
    if config.one:
        print(json.dumps(measure(config.one)))
        return
    names = [*METHODS, "sft + LoRA", "dpo + LoRA", "grpo with reference + LoRA", "ppo, shared network + LoRA"]
    figures: dict[str, Any] = {}
    for name in names:
        if config.measured:
            command = [sys.executable, "-m", "benchmarks.online_memory", "--one", name]
            figures[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        else:
            figures[name] = compiled_bytes(name, "gpt2")
        print(name, figures[name], flush=True)
    print(record("online_memory_measured" if config.measured else "online_memory", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
