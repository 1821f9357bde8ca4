"""What an update costs in memory and time: SFT, DPO, RLOO, GRPO, PPO and TRPO on the same rows, all parameters or LoRA.

    python -m benchmarks.online_memory                       # GPT-2 124M: the bytes of compiled programs; nothing is allocated
    python -m benchmarks.online_memory --measured            # a smaller GPT-2, run for real: seconds and peak memory too

A row is a prompt of 64 tokens with a completion of 64. State: parameters that are trained, their optimizer (AdamW, 8 bytes a
parameter), a reference model and a frozen base, all in float32. Temporary: what the compiled update needs beside them:
gradients and activations.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.results import record
from jaxrl_llm.losses import cross_entropy_loss, dpo_loss
from jaxrl_llm.models import GPT2, GPT2Config, LoraConfig, adapt, head_kernel, join_trainable, split_trainable
from jaxrl_llm.recipes.text import grpo, ppo, rloo, trpo
from jaxrl_llm.recipes.text.experience import Policy, Rollout
from jaxrl_llm.recipes.text.iteration import Method, OnlineOptions, make_update, start_state
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.rollouts import Completions, score_completions
from jaxrl_llm.training import init_train_state, make_train_step
from jaxrl_llm.types import Params

ROWS, PROMPT, COMPLETION = 16, 64, 64
SIZES = {
    "gpt2": GPT2Config(),
    "small": GPT2Config(n_layer=4, n_head=4, n_embd=256, n_positions=256),
}
COST: dict[str, Any] = {"num_prompts": 2, "num_generations": 8, "max_completion_length": COMPLETION, "chunk_size": 16}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    measured: bool = False
    """Run the smaller model for real, each method in a process of its own."""
    one: str = ""
    """Measure this one in this process and print it; used by `--measured`."""


class Update(NamedTuple):
    """One update: `function(state, kept, rows) -> state`, and shapes of its arguments.

    Attributes:
        function: The update.
        start: Makes (state, kept): what changes, and what stays (a reference, a frozen base).
    """

    function: Callable[..., Any]
    start: Callable[[], tuple[Any, Any]]


class Fixed(NamedTuple):
    """What an update reads and does not change."""

    frozen: Params
    reference: Params | None


def make_rows(vocab: int) -> Rollout:
    """Makes prompts and completions of full length with rewards."""
    rng = np.random.default_rng(0)
    ids = [jnp.asarray(rng.integers(0, vocab, (ROWS, width)), jnp.int32) for width in (PROMPT, COMPLETION)]
    full = [jnp.ones(x.shape, bool) for x in ids]
    zeros = jnp.zeros(ids[1].shape)
    rewards = jnp.asarray(rng.normal(size=(ROWS, 1)), jnp.float32)
    return Rollout(ids[0], full[0], Completions(ids[1], full[1], zeros, zeros), rewards)


def language_model(size: str, lora: bool) -> tuple[GPT2, Callable[[], Params]]:
    """Makes a model and a function that makes its parameters."""
    module = GPT2(SIZES[size])

    def init() -> Params:
        params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return adapt(jax.random.key(1), params, LoraConfig()) if lora else params

    return module, init


def offline_update(name: str, size: str, lora: bool) -> Update:
    """Makes an update of SFT or DPO; DPO takes the first half of the rows as chosen, the other as rejected."""
    module, init = language_model(size, lora)
    optimizer = optax.adamw(1e-5)

    def log_probs(params: Params, rows: Rollout) -> jax.Array:
        text = rows.prompt_ids, rows.prompt_mask, rows.completions.ids, rows.completions.mask
        return score_completions(module.apply, head_kernel, params, *text, chunk_size=COST["chunk_size"]).log_probs

    def function(state: Any, kept: Fixed, rows: Rollout) -> Any:
        def loss_fn(trained: Params, batch: Rollout, key: Any):
            scored = log_probs(join_trainable(trained, kept.frozen), batch)
            if name == "sft":
                return cross_entropy_loss(scored, batch.completions.mask)
            sums = scored.sum(-1)
            reference = log_probs(_reference(kept), batch).sum(-1)
            half = ROWS // 2
            return dpo_loss(sums[:half], sums[half:], reference[:half], reference[half:], beta=0.1)

        return make_train_step(loss_fn, optimizer)(state, rows, jax.random.key(0))[0]

    def start() -> tuple[Any, Fixed]:
        trained, frozen = split_trainable(init())
        reference = jax.tree.map(jnp.copy, trained) if name == "dpo" and frozen is None else None
        return init_train_state(trained, optimizer), Fixed(frozen, reference)

    return Update(function, start)


def _reference(kept: Fixed) -> Params:
    return kept.frozen if kept.reference is None else kept.reference


def online_update(name: str, size: str, lora: bool) -> Update:
    """Makes an update of an online method, from a rollout that is there already."""
    module, init = language_model(size, lora)
    optimizer: optax.GradientTransformation = optax.adamw(1e-5)
    stub = LanguageModel(module, None, _NoTokenizer())
    config, method = _method(name, stub)
    if name == "trpo":
        optimizer = trpo.make_optimizer(config)
    referred = "reference" in name or name.startswith("ppo")

    def function(state: Any, kept: Fixed, rows: Rollout) -> Any:
        def apply(variables: dict[str, Params], *args: Any, **options: Any) -> Any:
            return module.apply({"params": join_trainable(variables["params"], kept.frozen)}, *args, **options)

        policy = Policy(apply, lambda params: head_kernel(join_trainable(params, kept.frozen)), 1.0, COST["chunk_size"])
        update = make_update(policy, optimizer, method, config, eos_ids=(0,))
        reference = ({} if lora else kept.reference) if referred else None
        return update(state, reference, rows, jax.random.key(0))[0]

    def start() -> tuple[Any, Fixed]:
        trained, frozen = split_trainable(init())
        reference = jax.tree.map(jnp.copy, trained) if referred and not lora else None
        return start_state(method, method.start(jax.random.key(2), trained), optimizer), Fixed(frozen, reference)

    return Update(function, start)


class _NoTokenizer:
    """Stands for a tokenizer that ends texts with 0."""

    eos_token_id = 0


def _method(name: str, model: LanguageModel) -> tuple[OnlineOptions, Method]:
    if name.startswith("ppo"):
        config = ppo.Config(**COST, num_iterations=1, value_network="shared" if "shared" in name else "separate")
        return config, ppo.make_method(model, config)
    if name == "trpo":
        trust = trpo.Config(**COST)
        return trust, trpo.make_method(trust)
    if name.startswith("rloo"):
        leave = rloo.Config(**COST)
        return leave, rloo.make_method(leave)
    group = grpo.Config(**COST, beta=0.04 if "reference" in name else 0.0)
    return group, grpo.make_method(group)


METHODS = ("sft", "dpo", "grpo", "grpo with reference", "rloo with reference", "ppo, shared network", "ppo", "trpo")


def make_one(name: str, size: str) -> Update:
    """Makes the update of a method; a name may end in ` + LoRA`."""
    plain, lora = name.removesuffix(" + LoRA"), name.endswith(" + LoRA")
    return (offline_update if plain in ("sft", "dpo") else online_update)(plain, size, lora)


def compiled_bytes(name: str, size: str) -> dict[str, float]:
    """Compiles an update from shapes alone; returns its figures."""
    update = make_one(name, size)
    state, kept = jax.eval_shape(update.start)
    rows = jax.eval_shape(lambda: make_rows(SIZES[size].vocab_size))
    return bytes_of(jax.jit(update.function, donate_argnums=0).lower(state, kept, rows).compile(), state, kept)


def bytes_of(compiled: Any, state: Any, kept: Any) -> dict[str, float]:
    """Tells the megabytes of a compiled update, and how many parameters it trains."""
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, kept)) if hasattr(x, "dtype"))
    figures = {"state_megabytes": held / 1e6, "temporary_megabytes": memory.temp_size_in_bytes / 1e6}
    trained = getattr(state, "train", state).params
    counted = {"trained_parameters": sum(x.size for x in jax.tree.leaves(trained))}
    return figures | {"megabytes": sum(figures.values())} | counted


def measure(name: str) -> dict[str, float]:
    """Runs updates of the smaller model; returns megabytes, seconds (median of 7) and the peak of resident memory."""
    update = make_one(name, "small")
    state, kept = jax.jit(update.start)()
    rows = make_rows(SIZES["small"].vocab_size)
    compiled = jax.jit(update.function, donate_argnums=0).lower(state, kept, rows).compile()
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(8):
        started = time.perf_counter()
        state = jax.block_until_ready(compiled(state, kept, rows))
        times.append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return bytes_of(compiled, *jax.eval_shape(update.start)) | {
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
