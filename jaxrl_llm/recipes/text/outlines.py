"""Runs as shapes: what a run holds, and the programs that it compiles, without allocating any of it.

`outline_run(outline_model(options), config).programs["step"].compile().memory_analysis()` tells the bytes of a step of SFT:
the step is the recipe's own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.data import PreferenceTokens, Tokens
from jaxrl_llm.models import split_trainable
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions
from jaxrl_llm.recipes.text import dpo, grpo, pairs, ppo, sft
from jaxrl_llm.recipes.text.iteration import Method, OnlineOptions, start_state
from jaxrl_llm.recipes.text.language_model import LanguageModel
from jaxrl_llm.recipes.text.offline import Fixed, make_step
from jaxrl_llm.recipes.text.online import as_rollout, make_programs
from jaxrl_llm.recipes.text.prompts import Prompts
from jaxrl_llm.training import init_train_state
from jaxrl_llm.training.step import WeightsFunction
from jaxrl_llm.types import Params

Recipe: TypeAlias = Literal["sft", "dpo", "grpo", "ppo"]
RecipeConfig: TypeAlias = sft.Config | dpo.Config | grpo.Config | ppo.Config


CPU_PLAN = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}
"""How a CPU compiles a program that is only looked at.

The first three make it quicker. The last leaves out what an accelerator does not
need: a CPU multiplies bfloat16 as float32, and XLA moves the conversion of frozen kernels out of the loop over layers, so that
all of them exist in float32 too.
"""


class Program(NamedTuple):
    """A program of a run.

    Attributes:
        function: What is compiled.
        arguments: Shapes of its arguments.
        inputs: Those of them that are made for each call, such as a batch; all others the run holds in any case.
        donated: Numbers of the arguments whose memory its outputs take over.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    inputs: Any
    donated: tuple[int, ...] = ()

    def compile(self, *, as_run: bool = False) -> Any:
        """Compiles it for the default backend from shapes alone.

        Args:
            as_run: Exactly as a run would; else, on a CPU, as `CPU_PLAN` says.
        """
        lowered = jax.jit(self.function, donate_argnums=self.donated).lower(*self.arguments)
        return lowered.compile(None if as_run or jax.default_backend() != "cpu" else CPU_PLAN)


class Outline(NamedTuple):
    """What a run holds from its first step to its last, and its programs; arrays are shapes.

    Attributes:
        trained: Parameters that are trained, those of a critic among them.
        frozen: The base that adapters leave as it is; None where all parameters are trained.
        opt_state: State of the optimizer.
        reference: A copy of the model that a loss compares with; None where there is none, or it is the base.
        programs: By name.
    """

    trained: Params
    frozen: Params | None
    opt_state: optax.OptState
    reference: Params | None
    programs: dict[str, Program]


def outline_offline(
    model: LanguageModel,
    config: OptimizerOptions,
    loss_fn: Callable[..., Any],
    weights_fn: WeightsFunction | None,
    batch: Any,
    reference_fn: Callable[[Params, Any], Any] | None = None,
) -> Outline:
    """Outlines a run on rows: its step and, with a reference, the scoring of a batch.

    Args:
        model: The model, with shapes for parameters.
        config: How parameters move.
        loss_fn: `loss_fn(params, batch, key)` of all parameters, as in `offline_task.Task`.
        weights_fn: Weights of a whole batch.
        batch: Shapes of a batch.
        reference_fn: `reference_fn(params, batch)`: what goes into the field `reference` of the batch.
    """
    optimizer, key = config.optimizer(config.warmup_steps + 2), jax.eval_shape(partial(jax.random.key, 0))
    trained, base = split_trainable(model.params)
    state = jax.eval_shape(lambda params: init_train_state(params, optimizer), trained)
    programs: dict[str, Program] = {}
    if reference_fn is not None:
        reference = model.params if base is None else base
        programs["reference scoring"] = Program(reference_fn, (reference, batch), batch)
        batch = batch._replace(reference=jax.eval_shape(reference_fn, reference, batch))
    step = make_step(config, loss_fn, weights_fn, optimizer)
    programs["step"] = Program(step, (state, batch, key, Fixed(base, None)), batch, (0,))
    copied = trained if base is None and reference_fn is not None else None
    return Outline(state.params, base, state.opt_state, copied, programs)


def outline_online(
    model: LanguageModel,
    config: OnlineOptions,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    needs_reference: bool,
) -> Outline:
    """Outlines a run on the model's own completions: its sampling, and the updates of an iteration.

    Args:
        model: The model, with shapes for parameters.
        config: Settings of the recipe; prompts have `max_prompt_length` tokens.
        method: What is learned from rewards.
        optimizer: Makes the updates.
        needs_reference: Whether the method compares with the model as it was at the start.
    """
    key = jax.eval_shape(partial(jax.random.key, 0))
    trained, base = split_trainable(model.params)
    state = jax.eval_shape(lambda key, params: start_state(method, method.start(key, params), optimizer), key, trained)
    copied = trained if needs_reference and base is None else None
    reference = copied if base is None else {} if needs_reference else None
    shape = config.num_prompts, config.max_prompt_length
    prompts = jax.eval_shape(lambda: Prompts(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), {}))
    programs = make_programs(model, method, optimizer, config)
    sampling = Program(programs.sample, (state.train.params, key, prompts, base), prompts)
    completions = jax.eval_shape(programs.sample, *sampling.arguments)
    rewards = jax.ShapeDtypeStruct((config.num_rows, len(config.reward_funcs)), jnp.float32)
    join = partial(as_rollout, num_generations=config.num_generations)
    rollout = jax.eval_shape(join, prompts, completions, rewards)
    update = Program(programs.update, (state, reference, rollout, key, base), rollout, (0,))
    return Outline(state.train.params, base, state.train.opt_state, copied, {"sampling": sampling, "update": update})


def outline_run(model: LanguageModel, config: RecipeConfig) -> Outline:
    """Outlines a run of a recipe, on rows and prompts of full length.

    Args:
        model: The model, with shapes for parameters.
        config: Settings of the recipe. Of `sft` and `dpo`, rows have `max_length` tokens.
    """
    if isinstance(config, sft.Config | dpo.Config):
        if isinstance(config, sft.Config):
            make_loss, weights_fn, reference_fn = sft.make_loss(model, config), sft.batch_weights, None
        else:
            make_loss, weights_fn = dpo.make_loss(model, config), pairs.batch_weights
            reference_fn = dpo.make_reference(model, config.without_dropout())
        return outline_offline(model, config, make_loss, weights_fn, _batch(model, config), reference_fn)
    optimizer = config.optimizer(max(config.max_steps * config.updates_per_step, config.warmup_steps + 1))
    if isinstance(config, grpo.Config):
        return outline_online(model, config, grpo.make_method(config), optimizer, needs_reference=config.beta > 0)
    method = ppo.make_method(model, config)
    return outline_online(model, config, method, optimizer, needs_reference=config.kl_coef > 0)


def _batch(model: LanguageModel, config: sft.Config | dpo.Config) -> Any:
    """Makes the shapes of a batch of full rows, by the recipe's own collation."""
    length, count = config.max_length, config.per_device_train_batch_size
    ids = np.zeros(length, np.int32)
    if isinstance(config, sft.Config):
        collate = partial(sft.collate, model.pad_id, [Tokens(ids, np.arange(length) > 0, False)] * count)
    else:
        row = PreferenceTokens(ids[:1], ids[1:], ids[1:], False)
        collate = partial(pairs.collate_pairs, model.pad_id, [row] * count)
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, collate(length)))


def recipe_config(recipe: Recipe, options: ModelOptions, **settings: Any) -> RecipeConfig:
    """Makes the settings of a recipe with all settings of a model, and of an optimizer, that the options have.

    Args:
        recipe: Which recipe.
        options: The model and what is trained of it.
        **settings: More settings of the recipe.
    """
    configs: dict[str, type[Any]] = {"sft": sft.Config, "dpo": dpo.Config, "grpo": grpo.Config, "ppo": ppo.Config}
    shared = [field for kind in (ModelOptions, OptimizerOptions) for field in dataclasses.fields(kind)]
    given = {field.name: getattr(options, field.name) for field in shared if hasattr(options, field.name)}
    if recipe == "ppo" and options.adapts:
        given["value_network"] = "shared"
    return configs[recipe](**{"dataset": "rows"} | given | settings)
