"""What a run will need in memory, before anything is allocated.

    jaxrl-llm estimate --model my/gpt2 --recipe dpo --batch-size 8 --memory 24
    jaxrl-llm estimate --recipe grpo --n-layer 12 --n-head 12 --n-embd 768 --n-positions 1024 --batch-size 16

The programs are those that the recipe would run, compiled from shapes: of a saved model only config.json is read. One column
for each way to train: all parameters, LoRA (rank lora_r), QLoRA. Temporary: activations, gradients, the KV cache. Peak:
what the run holds, with what its largest program needs beside it. With `memory` it says what fits. GB are 10^9 bytes.

The figures are of the programs that XLA makes for this machine's backend, and another plans otherwise. One thing is left out
of a CPU's: with adapters and `--dtype bfloat16` it would hold all kernels in float32 too, as no accelerator needs to (see
`outlines.CPU_PLAN`). Training all parameters with bfloat16 is float32 throughout on a CPU, and so estimated too high. What
an allocator wastes, a tenth or so, is not counted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxrl_llm.recipes.options import LoraOptions, ModelOptions, OptimizerOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.text import dpo, grpo, ppo, sft
from jaxrl_llm.recipes.text.language_model import outline_model, require_room
from jaxrl_llm.recipes.text.outlines import Outline, Recipe, RecipeConfig, outline_run, recipe_config

GB = 1e9
VALIDATE = {"sft": sft.validate, "dpo": dpo.validate, "grpo": grpo.validate, "ppo": ppo.validate}


class Way(NamedTuple):
    """A way to train: all parameters where the rank is 0, else adapters of that rank, beside a quantised base or not."""

    rank: int
    quantized: bool = False

    @property
    def label(self) -> str:
        """Its name."""
        kind = "QLoRA" if self.quantized else "LoRA"
        return f"{kind} r {self.rank}" if self.rank else "all parameters"


TRIED = (Way(0), Way(32), Way(16), Way(8, quantized=True))
"""Ways to train, from the one that needs most memory to the one that needs least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelOptions, OptimizerOptions):
    """What to estimate."""

    recipe: Recipe = "sft"
    """Which recipe; what is not an option here is as that recipe has it by default."""
    batch_size: int = 32
    """Rows of a step (of dpo: pairs); of grpo and ppo the completions of an iteration."""
    max_prompt_length: int = 128
    """Tokens of a prompt."""
    max_completion_length: int = 128
    """Tokens of a completion; rows of sft and dpo have those of both."""
    num_generations: int = 8
    """Completions of each prompt, of grpo and ppo."""
    memory: float = 0.0
    """Memory of the device in GB, to be told what fits; 0: not asked."""


class Need(NamedTuple):
    """Bytes that a run needs.

    Attributes:
        trained_parameters: Number of parameters that are trained.
        parameters: All parameters: those that are trained and those that are not.
        optimizer: State of the optimizer.
        reference: A copy of the model to compare with.
        kv_cache: Keys and values while sampling; they are part of what the sampling program needs.
        temporary: What the largest program needs for activations and gradients.
        peak: All that is held with all that the largest program needs.
        program: The program whose peak it is.
    """

    trained_parameters: int
    parameters: int
    optimizer: int
    reference: int
    kv_cache: int
    temporary: int
    peak: int
    program: str


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_model()
    config.validate_optimizer()
    require(
        "adapter", config.adapter, "empty: lora_r and target_modules say what is trained here", lambda name: not name
    )
    sizes = ("batch_size", "max_prompt_length", "max_completion_length", "num_generations")
    require_at_least(1, **{name: getattr(config, name) for name in sizes})
    require("memory", config.memory, "at least 0", lambda memory: memory >= 0)
    rows, parts = config.batch_size, config.gradient_accumulation_steps
    require("gradient_accumulation_steps", parts, f"a divisor of batch_size={rows}", lambda k: rows % k == 0)
    if config.recipe in ("grpo", "ppo"):
        meant = f"a multiple of num_generations={config.num_generations}"
        require("batch_size", rows, meant, lambda rows: rows % config.num_generations == 0)
    require("mesh", config.mesh, "empty: this is for one device", lambda mesh: not mesh)
    for way in (Way(0), Way(config.lora_r)):
        VALIDATE[config.recipe](settings_of(config, way))


def settings_of(config: Config, way: Way) -> RecipeConfig:
    """Makes the settings of the recipe for one way to train."""
    adapted: dict[str, Any] = {"qlora": way.quantized, "lora": way.rank > 0 and not way.quantized}
    unread = dataclasses.fields(LoraOptions) if way.rank == 0 else ()
    plain = {field.name: field.default for field in unread}
    rank = {"lora_r": way.rank} if way.rank else {}
    quantized = {} if way.quantized else {"quant_type": "nf4", "use_double_quant": False}
    options = dataclasses.replace(config, **quantized | plain | adapted | rank)
    length = config.max_prompt_length + config.max_completion_length
    if config.recipe in ("sft", "dpo"):
        return recipe_config(config.recipe, options, max_length=length, per_device_train_batch_size=config.batch_size)
    return recipe_config(
        config.recipe,
        options,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        num_generations=config.num_generations,
        num_prompts=config.batch_size // config.num_generations,
    )


def need_of(run: Outline, kv_cache: int = 0) -> Need:
    """Compiles the programs of a run, and tells what it needs."""
    parameters, optimizer = bytes_of((run.trained, run.frozen)), bytes_of(run.opt_state)
    reference = bytes_of(run.reference)
    memory = {name: program.compile().memory_analysis() for name, program in run.programs.items()}
    beside = {
        name: found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + bytes_of(run.programs[name].inputs)
        for name, found in memory.items()
    }
    program = max(beside, key=lambda name: beside[name])
    return Need(
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(run.trained)),
        parameters=parameters,
        optimizer=optimizer,
        reference=reference,
        kv_cache=kv_cache,
        temporary=max(found.temp_size_in_bytes for found in memory.values()),
        peak=parameters + optimizer + reference + beside[program],
        program=program,
    )


def bytes_of(tree: Any) -> int:
    """Counts the bytes of arrays, or of what they would have."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def estimate(config: Config, way: Way) -> Need:
    """Estimates a run that trains in one way.

    Args:
        config: What to estimate.
        way: What is trained.

    Raises:
        ValueError: If the model has no room for prompts and completions.
    """
    settings = settings_of(config, way)
    model = outline_model(settings)
    tokens = config.max_prompt_length + config.max_completion_length - 1
    require_room(model, tokens, "lower max_prompt_length or max_completion_length")
    cache = 0
    if config.recipe in ("grpo", "ppo"):
        decoder = model.module.config
        slots, head = tokens, decoder.kv_heads * decoder.head_size
        cache = 2 * decoder.num_layers * config.batch_size * slots * head * decoder.dtype.itemsize
    return need_of(outline_run(model, settings), cache)


def rule_of_thumb(memory: float) -> str:
    """Says what the usual rule by the memory of a device (in GB) is, whatever the model."""
    if memory > 20:
        return "all parameters or LoRA r 32"
    return "LoRA r 16" if memory >= 10 else "QLoRA r 8"


def run(config: Config) -> dict[str, Any]:
    """Estimates each way to train, and prints a table.

    Returns:
        `backend` and, for each way by its name, `ways`: the fields of `Need`; with `memory` also `fits`: the first of all
        parameters, LoRA of rank 32 and 16 and QLoRA of rank 8 that does, or None.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a setting is wrong.
    """
    validate(config)
    ways = [Way(0), Way(config.lora_r), Way(config.lora_r, quantized=True)]
    needs = {way: estimate(config, way) for way in ways}
    backend, model = jax.default_backend(), config.model or f"a new {config.model_type}"
    facts(f"{config.recipe.upper()} of {model}, compiled for {backend}; nothing was allocated", _rows_of(config))
    figures: dict[str, Any] = {"backend": backend, "ways": {way.label: need._asdict() for way, need in needs.items()}}
    _print(needs, config.memory)
    if config.memory:
        fitting = _first_that_fits(config, needs)
        figures["fits"] = None if fitting is None else fitting.label
        first = "None fits" if fitting is None else f"The first that fits is {fitting.label}"
        tried, rule = ", ".join(way.label for way in TRIED), rule_of_thumb(config.memory)
        facts(f"{first} (of {tried}); the usual rule for {config.memory:g} GB says {rule}.", {})
    return figures


def _rows_of(config: Config) -> dict[str, Any]:
    lengths = f"{config.max_prompt_length} + {config.max_completion_length} tokens"
    return {"rows": config.batch_size, "length": lengths, "parts": config.gradient_accumulation_steps}


def _first_that_fits(config: Config, needs: Mapping[Way, Need]) -> Way | None:
    for way in TRIED:
        need = needs[way] if way in needs else estimate(config, way)
        if need.peak <= config.memory * GB:
            return way
    return None


def _print(needs: Mapping[Way, Need], memory: float) -> None:
    held = ("parameters", "optimizer", "reference", "kv_cache", "temporary", "peak")
    rows = [["trained", *(f"{need.trained_parameters:,}" for need in needs.values())]]
    for name in held:
        rows.append([f"{name.replace('_', ' ')}, GB", *(f"{getattr(need, name) / GB:.3g}" for need in needs.values())])
    rows.append(["peak in", *(need.program for need in needs.values())])
    if memory:
        rows.append(["fits", *("yes" if need.peak <= memory * GB else "no" for need in needs.values())])
    title = "What each way holds, and what its largest program needs beside it (temporary)"
    table(title, ["", *(way.label for way in needs)], rows)
